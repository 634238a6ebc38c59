"""ARPA files, line by line: the text form of a back-off n-gram model, as SRILM and KenLM write it.

    \\data\\
    ngram 1=3
    ngram 2=1

    \\1-grams:
    -0.6	hello	-0.3        log10 probability, words, log10 back-off (absent means 0)

    \\2-grams:
    -0.1	hello world

    \\end\\
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from manyvoice.errors import DecodeError, WorkError

COUNT = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")
# Not str.strip's default: a word may hold any other white space, such as a no-break space.
BLANKS = " \t\r\n"
SECTION = re.compile(r"\\(\d+)-grams:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One n-gram; logarithms are base ten, as in the file."""

    words: tuple[str, ...]
    log10: float
    backoff10: float


class _Lines:
    """Lines of a file, stripped, blank ones skipped; knows where it is, to say so when something is wrong."""

    def __init__(self, path: Path):
        self.path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        try:
            opened = gzip.open if self.path.suffix == ".gz" else open
            with opened(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    self.number += 1
                    if stripped := line.strip(BLANKS):
                        yield stripped
        except FileNotFoundError as error:
            raise DecodeError(f"{self.path}: no such ARPA file") from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DecodeError(f"{self.path}:{self.number + 1}: cannot be read as UTF-8 text: {error}") from error

    def refuse(self, what: str) -> NoReturn:
        raise DecodeError(f"{self.path}:{self.number}: {what}")


def read_entries(path: Path) -> Iterator[Entry]:
    """Every n-gram of the file, shortest first.

    Raises: DecodeError with file:line for whatever breaks the format: missing or wrong counts, sections out of order,
        numbers that are none, probabilities above one, repeated n-grams, words that are not among the 1-grams.
    """
    lines = _Lines(path)
    rows = iter(lines)
    if not any(line == "\\data\\" for line in rows):
        lines.refuse(r"no \data\ line; this is not an ARPA file")
    counts, section = _header(lines, rows)
    known: set[str] = set()
    for order, count in enumerate(counts, start=1):
        if section != f"\\{order}-grams:":
            lines.refuse(rf"expected \{order}-grams: but found {section!r}")
        seen: set[tuple[str, ...]] = set()
        # The line that ends a section is the title of the next.
        for section in rows:
            if section.startswith("\\") and (SECTION.fullmatch(section) or section == "\\end\\"):
                break
            entry = _entry(lines, section, order)
            if entry.words in seen:
                lines.refuse(f"{' '.join(entry.words)!r} is listed twice")
            if order == 1:
                known.update(entry.words)
            elif missing := [word for word in entry.words if word not in known]:
                lines.refuse(f"{missing[0]!r} is not among the 1-grams")
            seen.add(entry.words)
            yield entry
        else:
            lines.refuse(r"the file ends without \end\; it may be cut short")
        if len(seen) != count:
            lines.refuse(f"{len(seen)} {order}-grams, but the header says {count}")
    if section != "\\end\\":
        lines.refuse(rf"expected \end\ but found {section!r}")


def _header(lines: _Lines, rows: Iterator[str]) -> tuple[list[int], str]:
    """The counts, and the title of the first section."""
    counts: list[int] = []
    for line in rows:
        if line.startswith("\\"):
            if not counts:
                lines.refuse(r"no 'ngram 1=COUNT' line after \data\ ")
            return counts, line
        match = COUNT.fullmatch(line)
        if match is None or int(match[1]) != len(counts) + 1:
            lines.refuse(f"expected 'ngram {len(counts) + 1}=COUNT' but found {line!r}")
        counts.append(int(match[2]))
    lines.refuse("the file ends in its header; it may be cut short")


def _entry(lines: _Lines, line: str, order: int) -> Entry:
    fields = re.split(r"[ \t]+", line)
    if len(fields) not in (order + 1, order + 2):
        lines.refuse(f"expected log10, {order} words and perhaps a back-off, but found {line!r}")
    log10 = _number(lines, fields[0], "probability")
    if log10 > 0:
        lines.refuse(f"log10 probability must not be above 0, but is {fields[0]}")
    backoff10 = _number(lines, fields[-1], "back-off") if len(fields) == order + 2 else 0.0
    return Entry(words=tuple(fields[1 : order + 1]), log10=log10, backoff10=backoff10)


def _number(lines: _Lines, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        lines.refuse(f"log10 {what} must be a finite number, but is {text!r}")
    return value


def write_entries(path: Path, sections: Sequence[Sequence[Entry]]) -> None:
    """Write the n-grams of each order; zero back-offs are left out, as the format allows.

    Raises: WorkError if the file or a folder above it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, sections)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error}); check the folder and the space left") from error


def _write(path: Path, sections: Sequence[Sequence[Entry]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        print("\\data\\", *(f"ngram {n}={len(s)}" for n, s in enumerate(sections, start=1)), sep="\n", file=out)
        for order, section in enumerate(sections, start=1):
            print(f"\n\\{order}-grams:", file=out)
            for entry in section:
                tail = f"\t{entry.backoff10:.9g}" if entry.backoff10 else ""
                print(f"{entry.log10:.9g}\t{' '.join(entry.words)}{tail}", file=out)
        print("\n\\end\\", file=out)
