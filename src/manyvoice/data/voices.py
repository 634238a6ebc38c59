"""Who speaks: speakers drawn from a seed, dialects, and simulated atypical speech."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.sax.saxutils import escape

from manyvoice.data.espeak import SEPARATOR
from manyvoice.errors import UsageError

#: Dialect -> espeak-ng's voice file. Files, because "en-gb" as a name is not found by the library.
ENGLISH: Mapping[str, str] = {
    "en-gb": "gmw/en",
    "en-us": "gmw/en-US",
    "en-us-nyc": "gmw/en-US-nyc",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-x-gbclan": "gmw/en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-029": "gmw/en-029",
}
#: cmn-Latn-pinyin, because plain ``sit/cmn`` of espeak-ng 1.51 looks up the pinyin of a character and then reads it
#: aloud as English (espeak-ng issue 1236).
CHINESE: Mapping[str, str] = {"cmn": "sit/cmn-Latn-pinyin", "yue": "sit/yue", "hak": "sit/hak"}
DIALECTS: Mapping[str, str] = {**ENGLISH, **CHINESE}

#: Variants of espeak-ng 1.51 and 1.52 that sound like people: no robots, whisperers or single-pitch voices.
_VARIANTS = """
    Alex Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Lee Marco Mario Michael Mike adam antonio aunty
    belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 grandma grandpa gustave iven iven3 john linda m1 m2
    m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph
    steph2 travis zac
"""
VARIANTS: tuple[str, ...] = tuple(_VARIANTS.split())

Process = Mapping[str, str]
#: Phonological processes of disordered speech, in espeak-ng's phoneme names: heard -> said.
PROCESSES: Mapping[str, Mapping[str, Process]] = {
    "en": {
        "velar fronting": {"k": "t", "g": "d", "N": "n"},
        "lisp": {"s": "T", "z": "D"},
        "stopping": {"f": "p", "v": "b", "T": "t", "D": "d"},
        "gliding": {"r": "w", "l": "w"},
        "deaffrication": {"tS": "S", "dZ": "Z"},
        "depalatalisation": {"S": "s", "Z": "z", "tS": "t"},
    },
    "cmn": {
        "velar fronting": {"k": "t", "kh": "th"},
        "retroflex loss": {"s.": "s", "ts.": "ts", "ts.h": "tsh"},
        "deaspiration": {"ph": "p", "th": "t", "kh": "k"},
        "denasalisation": {"n": "l", "m": "p"},
    },
    "yue": {
        "velar fronting": {"k": "t", "g": "d"},
        "deaspiration": {"p": "b", "t": "d", "c": "z"},
        "denasalisation": {"n": "l", "m": "b"},
    },
    "hak": {
        "velar fronting": {"k": "t", "kh": "th"},
        "deaspiration": {"ph": "p", "th": "t", "tsh": "ts"},
        "denasalisation": {"n": "l", "m": "p"},
    },
}
_STRESS = re.compile(r"([',%=]*)(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Atypical:
    """How a simulated atypical speaker differs, the same in all that the speaker says.

    Args: processes: names in ``PROCESSES``.  substitutions: (phoneme, what is said instead).
        pause_probability: of a break between two words.  pause_ms: range of a break.
    """

    processes: tuple[str, ...]
    substitutions: tuple[tuple[str, str], ...]
    pause_probability: float
    pause_ms: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One synthetic voice.

    Args: pitch: espeak-ng's 0 to 99.  pitch_range: per cent of the voice's own.  rate: words a minute.
    """

    dialect: str
    variant: str
    pitch: int
    pitch_range: int
    rate: int
    atypical: Atypical | None = None

    @property
    def name(self) -> str:
        """Dialect, variant and a digest of everything, so that two corpora never give two voices one name."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:6]
        return f"{self.dialect}-{self.variant.lower()}-{digest}"

    @property
    def voice(self) -> str:
        """espeak-ng's name: language file and variant."""
        return f"{DIALECTS[self.dialect]}+{self.variant}"

    @property
    def language(self) -> str:
        """``en``, ``cmn``, ``yue`` or ``hak``."""
        return language_of(self.dialect)

    def describe(self) -> dict[str, Any]:
        """What ``corpus.json`` says of the speaker."""
        return {"name": self.name, "voice": self.voice, "language": self.language, **asdict(self)}


def language_of(dialect: str) -> str:
    """Language of a dialect. Raises: UsageError for an unknown one."""
    if dialect not in DIALECTS:
        raise UsageError(f"dialects: {dialect!r} is unknown; use some of {', '.join(DIALECTS)}")
    return "en" if dialect in ENGLISH else dialect


def draw_speakers(count: int, dialects: Sequence[str], *, seed: int, atypical: int = 0) -> tuple[Speaker, ...]:
    """``count`` different speakers, dialects in turn, the first ``atypical`` of them atypical.

    Speaker ``i`` of a seed and a list of dialects is the same whatever the count.
    """
    drawn: list[Speaker] = []
    for i in range(count):
        rng = random.Random(f"{seed}/speaker/{i}")
        speaker = _draw(dialects[i % len(dialects)], rng, i < atypical)
        while speaker in drawn:
            speaker = _draw(dialects[i % len(dialects)], rng, i < atypical)
        drawn.append(speaker)
    return tuple(drawn)


def speaker_split(
    speakers: Sequence[Speaker], splits: Mapping[str, float], seed: int = 0
) -> dict[str, tuple[Speaker, ...]]:
    """Deal speakers out in proportion to the shares, typical and atypical apart; every split gets at least one.

    Raises: UsageError if there are fewer speakers than splits.
    """
    if len(speakers) < len(splits):
        raise UsageError(
            f"speakers = {len(speakers)}: {len(splits)} splits with held-out speakers need one each; ask for"
            f" {len(splits)} or more, or let the splits share speakers"
        )
    dealt: dict[str, list[Speaker]] = {name: [] for name in splits}
    typical = [speaker for speaker in speakers if speaker.atypical is None]
    atypical = [speaker for speaker in speakers if speaker.atypical is not None]
    for group in (typical, atypical):
        shuffled = random.Random(f"{seed}/split").sample(group, len(group))
        given = dict.fromkeys(splits, 0)
        for i, speaker in enumerate(shuffled, 1):
            name = max(splits, key=lambda split: (splits[split] * i - given[split], not dealt[split]))
            given[name] += 1
            dealt[name].append(speaker)
    for name in splits:
        if not dealt[name]:
            richest = max(splits, key=lambda split: len(dealt[split]))
            dealt[name].append(dealt[richest].pop())
    return {name: tuple(group) for name, group in dealt.items()}


def _draw(dialect: str, rng: random.Random, atypical: bool) -> Speaker:
    return Speaker(
        dialect=dialect,
        variant=rng.choice(VARIANTS),
        pitch=rng.randint(25, 75),
        pitch_range=rng.randint(60, 150),
        rate=rng.randint(90, 120) if atypical else rng.randint(135, 200),
        atypical=_draw_atypical(language_of(dialect), rng) if atypical else None,
    )


def _draw_atypical(language: str, rng: random.Random) -> Atypical:
    known = PROCESSES[language]
    names = sorted(rng.sample(sorted(known), rng.randint(2, 3)))
    merged: dict[str, str] = {}
    for name in names:
        merged.update(known[name])
    return Atypical(
        processes=tuple(names),
        substitutions=tuple(sorted(merged.items())),
        pause_probability=round(rng.uniform(0.15, 0.6), 2),
        pause_ms=(rng.randint(80, 200), rng.randint(300, 700)),
    )


def substitute(phonemes: str, substitutions: Mapping[str, str]) -> list[str]:
    """Words of ``Engine.phonemes``, each phoneme replaced once, its stress kept; ready for ``[[...]]``."""
    words = []
    for word in phonemes.split():
        said = []
        for token in word.split(SEPARATOR):
            found = _STRESS.fullmatch(token)
            stress, phoneme = (found[1], found[2]) if found else ("", token)
            said.append(stress + substitutions.get(phoneme, phoneme))
        words.append("".join(said))
    return words


def script(speaker: Speaker, text: str, phonemes: str | None, rng: random.Random) -> str:
    """SSML of one utterance.

    Args: phonemes: what ``Engine.phonemes`` gave, needed if the speaker is atypical; otherwise the text is spoken.
    """
    if phonemes is None:
        # espeak-ng takes "[[" in text for phonemes
        body = escape(re.sub(r"\[(?=\[)", "[ ", text))
    elif speaker.atypical is None:
        body = f"[[{' '.join(substitute(phonemes, {}))}]]"
    else:
        body = _hesitate(substitute(phonemes, dict(speaker.atypical.substitutions)), speaker.atypical, rng)
    # The space before the closing tag matters: espeak-ng reads a tag that touches "]]" aloud.
    return f'<prosody range="{speaker.pitch_range}%">{body} </prosody>'


def _hesitate(words: Sequence[str], how: Atypical, rng: random.Random) -> str:
    runs: list[list[str]] = [[]]
    breaks: list[int] = []
    for i, word in enumerate(words):
        if i > 0 and rng.random() < how.pause_probability:
            runs.append([])
            breaks.append(rng.randint(*how.pause_ms))
        runs[-1].append(word)
    spoken = [f"[[{' '.join(run)}]]" for run in runs]
    pauses = [f' <break time="{ms}ms"/> ' for ms in breaks]
    return spoken[0] + "".join(pause + run for pause, run in zip(pauses, spoken[1:], strict=True))
