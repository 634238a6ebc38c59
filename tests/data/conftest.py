"""What tests of corpora share."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def lines() -> Callable[[Path, Sequence[Mapping[str, object] | str]], Path]:
    """Writes a file of rows, each as JSON or as the text that it is; ``.gz`` is packed: ``lines(path, rows)``."""

    def write(path: Path, rows: Sequence[Mapping[str, object] | str]) -> Path:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return path

    return write
