"""What personalisation did for whom: counts of every speaker, and the whole of them by the project's rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from manyvoice.decode.compare import Arm, compare
from manyvoice.decode.evaluate import Evaluation
from manyvoice.decode.wer import resampled_sums
from manyvoice.errors import WorkError

_DRAWS = 2_000


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """One speaker's utterances under one model.

    Args: errors, words, character_errors, characters: of each utterance.  nats: of each, tokens beside.
    """

    errors: list[int]
    words: list[int]
    character_errors: list[int]
    characters: list[int]
    nats: list[float]
    tokens: list[int]

    @classmethod
    def of(cls, found: Evaluation, rows: Sequence[int]) -> Measured:
        """These utterances of an evaluation."""
        words, characters = found.words.counts, found.characters.counts
        return cls(
            errors=[words[k].errors for k in rows],
            words=[words[k].reference for k in rows],
            character_errors=[characters[k].errors for k in rows],
            characters=[characters[k].reference for k in rows],
            nats=[round(found.nats[k], 4) for k in rows],
            tokens=[found.tokens[k] for k in rows],
        )

    @property
    def wer(self) -> float:
        """Word error rate."""
        return sum(self.errors) / max(1, sum(self.words))

    @property
    def cer(self) -> float:
        """Character error rate."""
        return sum(self.character_errors) / max(1, sum(self.characters))

    @property
    def loss(self) -> float:
        """Nats per character."""
        return sum(self.nats) / max(1, sum(self.characters))


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One speaker.

    Args:
        kept, why: whether the voice is in the store, and if not why.  voice: its hash.
        adapt_seconds, adapt_utterances: that it learned from.  lr, round: of the candidate, and when it was best.
        choose_nats: per token on the utterances that choose, of the base and of the voice.
        others: how much larger the loss on others' speech is.
        before, after: the utterances that report, under the base and under the voice, kept or not.
        said: what else is to be known, such as the older voice that this one replaced.
    """

    speaker: str
    kept: bool
    why: str
    lr: float
    round: int
    adapt_seconds: float
    adapt_utterances: int
    choose_nats: tuple[float, float]
    others: float | None
    before: Measured
    after: Measured
    voice: str | None = None
    said: tuple[str, ...] = ()

    @property
    def served(self) -> Measured:
        """What this speaker gets."""
        return self.after if self.kept else self.before

    def change(self) -> tuple[float, tuple[float, float]]:
        """Errors a word with the voice less those with the base, and the two-sided 95 % interval of that.

        A paired bootstrap over the speaker's utterances that report (Efron 1979).
        """
        less_N2 = np.stack([np.subtract(self.after.errors, self.before.errors), self.before.words], axis=1)
        drawn_M2 = resampled_sums(less_N2, _DRAWS, np.random.default_rng(0))
        low, high = np.quantile(drawn_M2[:, 0] / np.maximum(drawn_M2[:, 1], 1), [0.025, 0.975])
        errors, words = less_N2.sum(0)
        return float(errors / max(1, words)), (float(low), float(high))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """A line of ``speakers.jsonl``. ValueError or TypeError for one that was cut off."""
        said = json.loads(line)
        nats = tuple(said.pop("choose_nats"))
        before, after = (Measured(**said.pop(name)) for name in ("before", "after"))
        told = tuple(said.pop("said", ()))
        return cls(before=before, after=after, choose_nats=(nats[0], nats[1]), said=told, **said)

    def to_json(self) -> str:
        """A line of ``speakers.jsonl``."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """A job's outcome.

    Args: left_out: speakers without enough speech, and why.  totals: error rates before and after, and the comparison.
        planned: of a dry run: each speaker's utterances to learn from, to choose by and to report on.
    """

    outcomes: list[Outcome]
    left_out: dict[str, str]
    totals: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As ``report.json``."""
        rows = []
        for o in self.outcomes:
            row = {k: v for k, v in asdict(o).items() if k not in ("before", "after")}
            row |= {"wer_before": o.before.wer, "wer_after": o.after.wer, "words": sum(o.before.words)}
            change, interval = o.change()
            row |= {"wer_change": change, "wer_change_interval": list(interval)}
            row |= {"cer_before": o.before.cer, "cer_after": o.after.cer}
            row |= {"loss_before": o.before.loss, "loss_after": o.after.loss}
            rows.append(row)
        found = {"totals": self.totals, "speakers": rows, "left_out": self.left_out, "settings": self.settings}
        return found | {"planned": self.planned} if self.planned else found

    def write(self, folder: Path) -> None:
        """``report.json`` and ``report.md``. WorkError if they cannot be written."""
        try:
            document = json.dumps(self.as_dict(), ensure_ascii=False, indent=1, default=str)
            (folder / "report.json").write_text(document + "\n", encoding="utf-8")
            (folder / "report.md").write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise WorkError(f"{folder}: the report cannot be written ({error}); make room and run it again") from error

    def text(self) -> str:
        """For people, in Markdown."""
        columns, rows = self.table()
        lines = ["# " + self.headline(), "", self.sentence(), ""]
        for row in (columns, ["---"] * len(columns), *rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        if said := [f"- {name}: {one}" for name, one in self.remarks()]:
            lines += ["", *said]
        return "\n".join(lines) + "\n"

    def remarks(self) -> list[tuple[str, str]]:
        """What else is to be known of a speaker, by name."""
        rows = [(o.speaker, one) for o in sorted(self.outcomes, key=lambda o: o.speaker) for one in o.said]
        return [(name, one) for name, one in map(_printable, rows)]

    def headline(self) -> str:
        """How many were helped, or would be trained."""
        few = len(self.planned) or self.totals["kept"]
        have = "has" if few == 1 else "have"
        what = "enough speech for a voice" if self.planned else "a voice of their own"
        return f"{few} of {len(self.planned) + self.totals['speakers']} speakers {have} {what}"

    def sentence(self) -> str:
        """What it was worth, by the project's rule."""
        if self.planned:
            return "Nothing was trained or written."
        return (
            f"Word error rate, where speakers without a voice count with the base: {self.totals['comparison']} Which "
            "voices are kept was decided on other utterances than these."
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns, and a row for every speaker, by name; those left out come last."""
        left_out = sorted(self.left_out.items())
        if self.planned:
            columns = ["speaker", "to learn from", "to choose by", "to report on", "left out"]
            rows = [[name, *map(str, counts), ""] for name, counts in sorted(self.planned.items())]
            rows += [[name, "", "", "", why] for name, why in left_out]
            return columns, [_printable(row) for row in rows]
        columns = ["speaker", "speech learned from", "words", "WER of the base", "WER of the voice",
                   "points of difference (95 %)", "kept"]  # fmt: skip
        rows = [
            [
                o.speaker, f"{o.adapt_seconds:.0f} s in {o.adapt_utterances}", str(sum(o.before.words)),
                f"{o.before.wer:.1%}", f"{o.after.wer:.1%}", _points(*o.change()), "yes" if o.kept else f"no: {o.why}",
            ]
            for o in sorted(self.outcomes, key=lambda o: o.speaker)
        ]  # fmt: skip
        rows += [[name, "", "", "", "", "", f"no: {why}"] for name, why in left_out]
        return columns, [_printable(row) for row in rows]


def summarise(outcomes: Sequence[Outcome], left_out: Mapping[str, str], settings: Mapping[str, Any]) -> Report:
    """All speakers together; those whose voice was not kept count with the base."""
    before, after = [o.before for o in outcomes], [o.served for o in outcomes]
    totals: dict[str, Any] = {"speakers": len(outcomes) + len(left_out), "kept": sum(o.kept for o in outcomes)}
    for name, side in (("before", before), ("after", after)):
        totals[f"wer_{name}"] = _ratio(side, "errors", "words")
        totals[f"cer_{name}"] = _ratio(side, "character_errors", "characters")
        totals[f"loss_{name}"] = _ratio(side, "nats", "characters")
    totals["comparison"] = "nothing was measured."
    words = np.asarray([w for m in before for w in m.words])
    if words.sum():
        arms = [
            Arm(name, np.asarray([[e for m in side for e in m.errors]]), words)
            for name, side in (("voices", after), ("the base", before))
        ]
        found = compare(arms[0], arms[1], synthetic=False)
        totals |= {"comparison": found.sentence(), "compared": found.as_dict()}
    return Report(outcomes=list(outcomes), left_out=dict(left_out), totals=totals, settings=dict(settings))


def _points(change: float, interval: tuple[float, float]) -> str:
    low, high = (100 * x for x in interval)
    return f"{100 * change:+.1f} ({low:+.1f} to {high:+.1f})"


def _printable(row: Sequence[str]) -> list[str]:
    """Names come from anybody's manifest."""
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in cell) for cell in row]


def _ratio(side: Sequence[Measured], over: str, under: str) -> float:
    return float(sum(sum(getattr(m, over)) for m in side) / max(1, sum(sum(getattr(m, under)) for m in side)))
