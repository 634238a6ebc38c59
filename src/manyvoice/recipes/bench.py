"""Benchmarks: one file per question in ``benchmarks/``, one JSON document per question in ``benchmarks/results/``.

A benchmark file defines ``run(bench: Bench) -> None``; it adds rows to the table, states its aims, and may be run
again: rows append, aims are computed from all rows it chooses to use.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, final

from manyvoice.decode.speed import machine
from manyvoice.errors import UsageError, WorkError
from manyvoice.recipes.watch import Watcher

Sense = Literal["at most", "below", "at least", "equal"]


@final
@dataclass(frozen=True, kw_only=True)
class Aim:
    """A goal in its own words and what was measured; ``holds`` is computed, never stated.

    Args:
        limit: what ``measured`` must be at most, below, at least, or equal to, in ``unit``.
        interval: of the measurement, where there is one; informative unless the aim says otherwise.
        why: explains a miss.
    """

    name: str
    sense: Sense
    limit: float
    unit: str
    measured: float | None
    interval: tuple[float, float] | None = None
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether the measurement meets the limit; nothing measured does not."""
        if self.measured is None:
            return False
        compare: Mapping[Sense, bool] = {
            "at most": self.measured <= self.limit,
            "below": self.measured < self.limit,
            "at least": self.measured >= self.limit,
            "equal": self.measured == self.limit,
        }
        return compare[self.sense]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a result file."""
        found = asdict(self)
        aim = f"{found.pop('sense')} {found.pop('limit'):g} {found.pop('unit')}".strip()
        found["interval"] = None if self.interval is None else list(self.interval)
        return {"name": self.name, "aim": aim, **found, "holds": self.holds}


@final
class Bench:
    """One run of one question.

    Args:
        question: name of the file.  folder: ``benchmarks``.  work: where corpora and runs of the benchmark go.
        options: ``a=b`` from the command line, as text; ``toy`` makes everything small, for tests of the benchmark.
    """

    def __init__(
        self,
        question: str,
        folder: Path,
        work: Path,
        options: Mapping[str, str],
        watcher: Watcher,
        *,
        accelerator: bool = False,
    ) -> None:
        self.question, self.work, self.options, self.watcher = question, work, dict(options), watcher
        self.asked: set[str] = set()
        name = f"{question}-gpu.json" if accelerator else f"{question}.json"
        self.path = folder / "results" / name if self.option("toy", "") == "" else work / name
        self.rows: list[dict[str, Any]] = []
        self.aims: list[Aim] = []
        # what an earlier run found stays until this one has come to its own end
        self._earlier: list[dict[str, Any]] = []
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows, self._earlier = found["rows"], found["aims"]

    def option(self, name: str, default: str) -> str:
        """A setting given as ``name=value``."""
        self.asked.add(name)
        return self.options.get(name, default)

    @property
    def toy(self) -> bool:
        """Whether this run only shows that the benchmark works."""
        return bool(self.option("toy", ""))

    @property
    def data(self) -> Path:
        """The folder of real speech. UsageError if ``MANYVOICE_DATA`` does not name one."""
        folder = os.environ.get("MANYVOICE_DATA", "")
        if not folder or not Path(folder).is_dir():
            raise UsageError(
                f"MANYVOICE_DATA = {folder!r}: must name a folder of real speech; docs/data.md says how to make one"
            )
        return Path(folder)

    def row(self, *, seed: int, **values: Any) -> None:
        """Add a row to the table, stamped, and save: what was measured is never lost to a later failure."""
        told = " ".join(f"{k}={self._told(v)}" for k, v in self.options.items())
        stamp = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "commit": _commit(),
            "machine": machine(),
            "command": f"manyvoice bench {self.question} {told}".strip(),
            "seed": seed,
        }
        self.rows.append({**values, **stamp})
        self.save()

    def _told(self, value: str) -> str:
        """An option as a row tells it, which names no folder of one machine.

        A path beside the scratch folder is told as if that were where it is by default; any other by its name.
        """
        path, beside = Path(value), self.work.resolve().parent
        if not path.is_absolute():
            return value
        return str(Path("runs/bench") / path.relative_to(beside)) if path.is_relative_to(beside) else path.name

    def find(self, **values: Any) -> list[dict[str, Any]]:
        """Rows with these values, oldest first."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in values.items())]

    def save(self) -> None:
        """Write the document aside, then rename it into place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        text = json.dumps(self.document(), indent=1, ensure_ascii=False)
        # a list of numbers, such as the errors of each utterance, is one line
        text = re.sub(r"\[\n[\d\s.,eE+-]*\]", lambda found: " ".join(found[0].split()), text)
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(self.path)

    def document(self) -> dict[str, Any]:
        """What the result file holds."""
        aims = [a.as_dict() for a in self.aims] or self._earlier
        return {"question": self.question, "rows": self.rows, "aims": aims}


def find_folder() -> Path:
    """``benchmarks`` of the checkout this package runs from, or of the current folder. UsageError if there is none."""
    for root in (Path.cwd(), *Path(__file__).resolve().parents):
        if (root / "benchmarks" / "results").is_dir():
            return root / "benchmarks"
    raise UsageError("benchmarks are part of a checkout, not of the installed package; run this inside a clone")


def questions(folder: Path) -> list[str]:
    """Names of the benchmarks there are."""
    return sorted(p.stem.replace("_", "-") for p in folder.glob("*.py"))


def run_question(
    question: str, options: Sequence[str], watcher: Watcher, *, work: Path | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Run a benchmark and return its document.

    Args: options: ``a=b``.  work: scratch folder, ``runs/bench/QUESTION`` if not given; what is there is used again.
    """
    folder = folder or find_folder()
    path = folder / f"{question.replace('-', '_')}.py"
    if not path.exists():
        raise UsageError(f"no benchmark {question!r}; there are {', '.join(questions(folder))}")
    pairs = [o.partition("=") for o in options]
    if bad := [o for o, (_, equals, _) in zip(options, pairs, strict=True) if not equals]:
        raise UsageError(f"option {bad[0]!r}: must look like name=value")
    work = work or Path("runs") / "bench" / question
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(question, folder, work, {name: value for name, _, value in pairs}, watcher)
    module_of(path).run(bench)
    # what a question asks for depends on its other options, so it is known only now
    if unused := [name for name in bench.options if name not in bench.asked]:
        watcher.note(f"{', '.join(unused)}: nothing asked for this; the file {path.name} says which options there are")
    bench.save()
    return bench.document()


def module_of(path: Path) -> ModuleType:
    """A benchmark's file as a module; it may import its neighbours. Raises WorkError for a file that is not Python."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise WorkError(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _commit() -> str:
    """Short hash of the checkout, with + if it has changes; "unknown" outside one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
