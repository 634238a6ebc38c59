"""What the commands print: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import yaml
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from manyvoice.errors import UsageError

# Without a terminal there are no bars, only a line now and then, so that a log stays readable.
_SECONDS_BETWEEN_LINES = 10.0


@final
class Terminal:
    """Implements :class:`manyvoice.recipes.watch.Watcher` with bars on a terminal and lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """A bar for each stage."""
        if not self.console.is_terminal:
            if done == total or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                self.console.print(f"{stage}: {done} of {total}", markup=False)
            return
        bars = self._started()
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(stage, total=total)
        bars.update(self._tasks[stage], completed=done, total=total)
        if done == total:
            del self._tasks[stage]
            if not self._tasks:
                self._stop()

    def step(self, line: Mapping[str, Any], epochs: int, left: float | None) -> None:
        """The state of training: a bar of epochs, and a line whenever the dev set was scored."""
        text = _state(line, epochs, left)
        scored = "dev_wer" in line
        if self.console.is_terminal:
            bars = self._started()
            if "training" not in self._tasks:
                self._tasks["training"] = bars.add_task("training", total=1000 * epochs)
            done = int(1000 * line["epoch"])
            bars.update(self._tasks["training"], completed=done, description=text)
            if scored:
                self.note(text)
            if done >= 1000 * epochs:
                self._stop()
        elif scored or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.note(text)

    def _started(self) -> Progress:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=self.console, transient=True)
            self._bars.start()
        return self._bars

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}


def _state(line: Mapping[str, Any], epochs: int, left: float | None) -> str:
    parts = [
        f"epoch {line['epoch']:.2f} of {epochs}",
        f"step {line['step']:.0f}",
        f"loss {line['loss']:.3f}",
        f"{line['audio_per_second']:.0f} s of audio a second",
        f"padding {line['padding']:.1%}",
    ]
    if "memory_mib" in line:
        parts.append(f"{line['memory_mib']:.0f} MiB")
    if "dev_wer" in line:
        of = f" (size {line['dev_size']} alone so far)" if "dev_size" in line else ""
        parts.append(f"dev WER {line['dev_wer']:.2%}{of}")
    if left is not None:
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return ", ".join(parts)


def emit(document: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    """The result on standard output: one JSON document, or text for people."""
    print(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, spare: Sequence[str] = (), note: str = ""
) -> None:
    """A table on standard output, as wide as it must be where that is no terminal; no cell is ever cut.

    Args: spare: columns to leave out on a narrow terminal, the first one first.  note: for below it.
    """
    console = Console(file=sys.stdout, highlight=False)
    cells = [[Text.from_markup(str(cell)) for cell in row] for row in rows]
    width = {name: max(cell_len(name), *(row[i].cell_len for row in cells), 0) + 3 for i, name in enumerate(columns)}
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, sum(width.values()) + 1)
    gone: list[str] = []
    for name in spare:
        if sum(width[c] for c in columns if c not in gone) + 1 > console.width:
            gone.append(name)
    if gone:
        note = "; ".join(filter(None, [note, f"no room for {', '.join(gone)}, which --json shows"]))
    drawn = Table(title=title or None, title_justify="left", caption=note or None, caption_justify="left")
    left = [i for i, name in enumerate(columns) if name not in gone]
    for i in left:
        drawn.add_column(columns[i], overflow="fold")
    for row in cells:
        drawn.add_row(*(row[i] for i in left))
    console.print(drawn)


def settings_of(given: list[str]) -> dict[str, Any]:
    """``rank=8`` to a mapping; a value is read as YAML."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"--set {one}: must look like rank=8")
        found[name] = yaml.safe_load(value)
    return found


def check_verb(command: str, place: str, verb: str, verbs: Sequence[str] | Mapping[str, object]) -> None:
    """UsageError unless the verb is one of the command's; it says so where verb and place are the wrong way round."""
    if verb in verbs:
        return
    if place in verbs:
        raise UsageError(f"{command} {place} {verb}: what it works on comes first: manyvoice {command} {verb} {place}")
    raise UsageError(
        f"{command} {verb}: must be {', '.join(verbs)}; for example: manyvoice {command} {place} {next(iter(verbs))}"
    )
