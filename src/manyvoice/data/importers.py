"""Public corpora, as published, to NeMo JSON-lines manifests; the audio stays where it is.

One row of `CORPORA` per corpus: its licence, its layout and the function that reads it. A further corpus is one
function and one row.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from manyvoice.data.audio import audio_info
from manyvoice.errors import CorpusError, UsageError
from manyvoice.types import Seconds

Facts = Mapping[str, str | int]
SHOWN = 3  # examples in a message or a report: enough to find the pattern
NOISE_MARKER = "<SPOKEN_NOISE>"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@final
@dataclass(frozen=True, kw_only=True)
class Spoken:
    """One utterance as its corpus tells it."""

    split: str
    id: str
    audio: Path
    text: str
    speaker: str
    facts: Facts = field(default_factory=dict)


@final
class LeftOut:
    """What an import did not take (utterances, files, parts of a transcript), by reason: how many, the first few."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = {}

    def add(self, reason: str, item: str) -> None:
        self._items.setdefault(reason, []).append(item)

    def report(self) -> dict[str, dict[str, Any]]:
        """reason -> count and examples."""
        return {reason: {"count": len(items), "first": items[:SHOWN]} for reason, items in self._items.items()}


Read = Callable[[Path, LeftOut], Iterator[Spoken]]


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the table.

    Args:
        layout: what the folder must look like, for messages.
        marks: paths that must exist in it.
        tells: facts that the corpus gives about its utterances; where a row lacks one it is counted as unknown.
        read: yields every utterance, in an order that does not depend on the machine.
    """

    title: str
    licence: str
    source: str
    citation: str
    layout: str
    marks: tuple[str, ...]
    tells: tuple[str, ...]
    read: Read


def import_corpus(name: str, folder: Path, out: Path, *, overwrite: bool = False) -> dict[str, Path]:
    """Write ``out/SPLIT.jsonl`` for each split of the corpus in ``folder``, and ``out/corpus.json``.

    A manifest's row has ``id``, ``audio_filepath`` (relative to ``out`` where the two share a folder below the root),
    ``duration`` in seconds from the audio header, ``text`` (lower case where the corpus is all capitals), ``speaker``
    and what else the corpus tells: ``gender`` ("m", "f"), ``age``, ``accent``, ``first_language``, ``city``, ``label``
    (the subdialect). ``corpus.json`` has name, version, licence, source, citation, counts, and what was left out, why.

    Returns: split -> manifest.
    Raises: UsageError for a name that is not in `CORPORA`. CorpusError if the folder is not laid out as published, a
        transcript or an audio file is missing, or ``out`` has files of an earlier import and ``overwrite`` is false.
        AudioError if a file cannot be opened. Nothing is written then.
    """
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r} is not one that can be imported; give one of {', '.join(sorted(CORPORA))}")
    corpus, folder, out = CORPORA[name], folder.resolve(), out.resolve()
    _check_layout(name, corpus, folder)
    left_out = LeftOut()
    splits: dict[str, list[dict[str, Any]]] = {}
    for spoken, duration in _with_durations(list(corpus.read(folder, left_out))):
        if not spoken.text:
            left_out.add("the transcript is empty", spoken.id)
        elif duration <= 0:
            left_out.add("the audio has no samples", spoken.id)
        else:
            splits.setdefault(spoken.split, []).append(_manifest_row(spoken, duration, folder, out))
    if not splits:
        raise CorpusError(f"{folder} has no utterance to import: expected {corpus.layout}; unpack the corpus again")
    about = _describe(name, corpus, folder, splits, left_out)
    return _write(splits, about, out, overwrite=overwrite)


def _check_layout(name: str, corpus: Published, folder: Path) -> None:
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder; give the folder of your copy of {name}: {corpus.source}")
    missing = [mark for mark in corpus.marks if not (folder / mark).exists()]
    if not missing:
        return
    nested = [c for c in sorted(folder.iterdir()) if c.is_dir() and all((c / mark).exists() for mark in corpus.marks)]
    way_out = f"the corpus seems to be in {nested[0]}: give that" if nested else "give the folder that has these"
    raise CorpusError(
        f"{folder} is not laid out as {name} is published: {', '.join(missing)} missing; "
        f"expected {corpus.layout}; {way_out}, or unpack the corpus again from {corpus.source}"
    )


def _with_durations(rows: Sequence[Spoken]) -> Iterator[tuple[Spoken, Seconds]]:
    absent = [str(row.audio) for row in rows if not row.audio.is_file()]
    if absent:
        raise CorpusError(
            f"{_some(absent)} missing, though the corpus lists {'them' if len(absent) > 1 else 'it'}: every utterance "
            "listed must have its audio; unpack the audio again, or take the lines out of the corpus's lists"
        )
    # Headers are small and disks are slow: waiting for several at once is what makes a million files bearable.
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = pool.map(audio_info, (row.audio for row in rows))
        yield from ((row, header.duration) for row, header in zip(rows, headers, strict=True))


def _manifest_row(spoken: Spoken, duration: Seconds, folder: Path, out: Path) -> dict[str, Any]:
    shared = Path(os.path.commonpath([folder, out])) if folder.anchor == out.anchor else Path(folder.anchor)
    # Below a shared folder both can move together; across the root a relative path is only a longer absolute one.
    where = os.path.relpath(spoken.audio, out) if shared != Path(folder.anchor) else str(spoken.audio)
    row = {"id": spoken.id, "audio_filepath": Path(where).as_posix(), "duration": round(duration, 4)}
    return {**row, "text": spoken.text, "speaker": spoken.speaker, **spoken.facts}


def _describe(
    name: str, corpus: Published, folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], left_out: LeftOut
) -> dict[str, Any]:
    rows = [row for split in splits.values() for row in split]
    return {
        "name": name,
        "title": corpus.title,
        "version": _stated_version(folder),
        "licence": corpus.licence,
        "source": corpus.source,
        "citation": corpus.citation,
        "splits": {split: _counts(split_rows) for split, split_rows in splits.items()},
        "unknown": {fact: n for fact in corpus.tells if (n := sum(fact not in row for row in rows))},
        "left_out": left_out.report(),
    }


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    labels = Counter(row["label"] for row in rows if "label" in row)
    counts: dict[str, Any] = {
        "utterances": len(rows),
        "speakers": len({row["speaker"] for row in rows}),
        "hours": round(sum(row["duration"] for row in rows) / 3600, 4),
    }
    return {**counts, "labels": dict(sorted(labels.items()))} if labels else counts


def _stated_version(folder: Path) -> str | None:
    file = folder / "VERSION"
    return _read_text(file).strip() or None if file.is_file() else None


def _write(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], about: dict[str, Any], out: Path, *, overwrite: bool
) -> dict[str, Path]:
    manifests = {split: out / f"{split}.jsonl" for split in splits}
    report = out / "corpus.json"
    existing = [str(path) for path in (*manifests.values(), report) if path.exists()]
    if existing and not overwrite:
        raise CorpusError(f"{_some(existing)} already there; choose another folder, or allow overwriting")
    stale = _manifests_of(report) - set(manifests.values())
    contents = {
        manifests[split]: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in splits.items()
    }
    whole = {**about, "manifests": [manifest.name for manifest in manifests.values()]}
    # The report comes last: where it is, the manifests are whole.
    contents[report] = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        for path, content in contents.items():
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text(content, encoding="utf-8")
            aside.replace(path)
        for path in stale:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(f"{out} cannot be written ({error}); choose a folder where you may write") from error
    return manifests


def _manifests_of(report: Path) -> set[Path]:
    """What an earlier import wrote beside its report."""
    if not report.is_file():
        return set()
    try:
        names = json.loads(_read_text(report)).get("manifests", [])
    except (json.JSONDecodeError, AttributeError):
        return set()
    # A name that leads elsewhere is not one that an import wrote.
    return {report.parent / name for name in names if Path(name).name == name and name.endswith(".jsonl")}


def _read_speechocean(folder: Path, left_out: LeftOut) -> Iterator[Spoken]:
    for split in ("train", "test"):
        age, gender = (_table(folder / split / f"spk2{fact}", optional=True) for fact in ("age", "gender"))
        for spoken in _kaldi(folder, split, split):
            facts = {**_person(age, gender, spoken.speaker), "first_language": "Mandarin"}
            yield replace(spoken, text=spoken.text.lower(), facts=facts)
    listed = {p for split in ("train", "test") for p in _table(folder / split / "wav.scp").values()}
    _leave_unlisted(folder, "WAVE", listed, left_out)


def _read_kespeech(folder: Path, left_out: LeftOut) -> Iterator[Spoken]:
    tasks = folder / "Tasks" / "ASR"
    published = ("train_phase1", "train_phase2", "dev_phase1", "dev_phase2", "test")
    parts = [part for part in published if (tasks / part / "wav.scp").is_file()]
    if not parts:
        raise CorpusError(f"{tasks} has none of {', '.join(published)} with a wav.scp in it; unpack the Tasks again")
    metadata = folder / "Metadata"
    age, gender, city = (_table(metadata / f"spk2{fact}", optional=True) for fact in ("age", "gender", "city"))
    listed = set()
    for part in parts:
        label = _table(tasks / part / "utt2subdialect", optional=True)
        listed |= set(_table(tasks / part / "wav.scp").values())
        for spoken in _kaldi(folder, f"Tasks/ASR/{part}", part):
            facts = _person(age, gender, spoken.speaker)
            facts |= {"city": city[spoken.speaker]} if spoken.speaker in city else {}
            facts |= {"label": label[spoken.id]} if spoken.id in label else {}
            # The marker says that something else than speech is heard; it is no word of the transcript.
            if NOISE_MARKER in spoken.text:
                left_out.add(f"{NOISE_MARKER} was taken out of the transcript", spoken.id)
            yield replace(spoken, text=spoken.text.replace(NOISE_MARKER, "").strip(), facts=facts)
    _leave_unlisted(folder, "Audio", listed, left_out)


def _read_fsdd(folder: Path, left_out: LeftOut) -> Iterator[Spoken]:
    people = _fsdd_speakers(folder / "metadata.py")
    for audio in sorted((folder / "recordings").iterdir()):
        found = re.fullmatch(r"(\d)_([^_]+)_(\d+)\.wav", audio.name)
        if not found:
            left_out.add("the name is not DIGIT_SPEAKER_INDEX.wav", f"recordings/{audio.name}")
            continue
        digit, speaker, index = found.groups()
        # The published rule: "Recordings numbered 0-4 (inclusive) are in the test and 5-49 are in the training set."
        split = "test" if int(index) <= 4 else "train"
        text, facts = DIGITS[int(digit)], people.get(speaker, {})
        yield Spoken(split=split, id=audio.stem, audio=audio, text=text, speaker=speaker, facts=facts)


def _fsdd_speakers(file: Path) -> dict[str, Facts]:
    """The dictionary in FSDD's metadata.py, read as a literal: nothing in it is run."""
    if not file.is_file():
        return {}
    try:
        _, _, literal = _read_text(file).partition("metadata =")
        told = ast.literal_eval(literal.strip())
        return {
            name: {"gender": _gender(facts["gender"]), "accent": str(facts["accent"])} for name, facts in told.items()
        }
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{file} must hold `metadata = {{speaker: {{'gender': ..., 'accent': ...}}}}`, but does not ({error!r}); "
            "restore it from the corpus, or remove it to go without gender and accent"
        ) from error


def _read_librispeech(folder: Path, left_out: LeftOut) -> Iterator[Spoken]:
    gender = _librispeech_genders(folder / "SPEAKERS.TXT")
    told = set()
    for lists in sorted(folder.glob("*/*/*/*.trans.txt")):
        told.add(lists.parent)
        chapter, speaker, split = lists.parent, lists.parent.parent.name, lists.parent.parent.parent.name
        texts = _table(lists)
        heard = {audio.stem for audio in chapter.glob("*.flac")}
        if untold := sorted(heard - set(texts)):
            raise _without("transcript", untold, lists)
        facts: Facts = {"gender": gender[speaker]} if speaker in gender else {}
        for id, text in texts.items():
            audio = chapter / f"{id}.flac"
            yield Spoken(split=split, id=id, audio=audio, text=text.lower(), speaker=speaker, facts=facts)
    for audio in folder.glob("*/*/*/*.flac"):
        if audio.parent not in told:
            lists = audio.parent / f"{audio.parent.parent.name}-{audio.parent.name}.trans.txt"
            raise _without("transcript", [audio.stem], lists)


def _librispeech_genders(file: Path) -> dict[str, str]:
    """Rows of ``ID | SEX | SUBSET | MINUTES | NAME``; comments begin with a semicolon."""
    lines = _read_text(file).splitlines() if file.is_file() else []
    fields = [[part.strip() for part in line.split("|")] for line in lines if line.strip() and line[0] != ";"]
    wrong = [parts for parts in fields if len(parts) < 2]
    if wrong:
        raise CorpusError(f"{file} must have rows of ID | SEX | ..., but has {wrong[0]}; restore it from the corpus")
    return {parts[0]: _gender(parts[1]) for parts in fields}


def _kaldi(folder: Path, lists: str, split: str) -> Iterator[Spoken]:
    """The utterances of a Kaldi data folder whose wav.scp is relative to ``folder``; the keys must agree."""
    where = folder / lists
    audio, text, speaker = (_table(where / name) for name in ("wav.scp", "text", "utt2spk"))
    for what, table, file in (("transcript", text, "text"), ("speaker", speaker, "utt2spk")):
        if lacking := sorted(set(audio) - set(table)):
            raise _without(what, lacking, where / file)
    if unheard := sorted(set(text) - set(audio)):
        raise _without("audio", unheard, where / "wav.scp")
    for id, path in audio.items():
        if path.endswith("|"):
            raise CorpusError(
                f"{where / 'wav.scp'}: {id} is the command {path!r}, and commands are not run; "
                "write the audio to files and list those"
            )
        yield Spoken(split=split, id=id, audio=folder / path, text=text[id], speaker=speaker[id])


def _table(file: Path, *, optional: bool = False) -> dict[str, str]:
    """A Kaldi table: the key, white space, the rest (which may be empty)."""
    if optional and not file.is_file():
        return {}
    table: dict[str, str] = {}
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        if key in table:
            raise CorpusError(f"{file}:{number}: {key} is there twice; keys must differ: remove one of the lines")
        table[key] = value.strip()
    return table


def _leave_unlisted(folder: Path, below: str, listed: set[str], left_out: LeftOut) -> None:
    known = {folder / path for path in listed}
    for root, folders, files in os.walk(folder / below):
        folders.sort()
        for name in sorted(files):
            audio = Path(root) / name
            if name.lower().endswith(".wav") and audio not in known:
                left_out.add("no wav.scp lists the audio", audio.relative_to(folder).as_posix())


def _person(age: Mapping[str, str], gender: Mapping[str, str], speaker: str) -> dict[str, str | int]:
    facts: dict[str, str | int] = {}
    if speaker in gender:
        facts["gender"] = _gender(gender[speaker])
    if age.get(speaker, "").isdigit():
        facts["age"] = int(age[speaker])
    return facts


def _gender(told: str) -> str:
    """ "m" and "f" for every corpus's way of saying so; anything else as it is."""
    return {"male": "m", "female": "f"}.get(told.lower(), told.lower())


def _without(what: str, ids: Sequence[str], file: Path) -> CorpusError:
    return CorpusError(
        f"{_some(ids)} without {what}: {file} should list {'them' if len(ids) > 1 else 'it'}; "
        f"restore the corpus's own file, or take the utterances out of the other lists"
    )


def _some(items: Sequence[str]) -> str:
    more = len(items) - SHOWN
    shown = ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} {'are' if len(items) > 1 else 'is'}"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CorpusError(f"{file} is missing, but belongs to the corpus; unpack the corpus again") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} must be UTF-8 text, but is not ({error.reason}); convert it") from error


CORPORA: dict[str, Published] = {
    "fsdd": Published(
        title="Free Spoken Digit Dataset",
        licence="CC BY-SA 4.0",
        source="https://github.com/Jakobovski/free-spoken-digit-dataset",
        citation="Z. Jackson, Free Spoken Digit Dataset, 2016",
        layout="recordings/DIGIT_SPEAKER_INDEX.wav and metadata.py",
        marks=("recordings",),
        tells=("gender", "accent"),
        read=_read_fsdd,
    ),
    "kespeech": Published(
        title="KeSpeech: Mandarin and its eight subdialects",
        licence="KeSpeech licence: non-commercial research, no distribution; see the agreement you signed",
        source="https://github.com/KeSpeech/KeSpeech",
        citation="Z. Tang et al., KeSpeech: An Open Source Speech Dataset of Mandarin and Its Eight Subdialects, "
        "NeurIPS Datasets and Benchmarks 2021",
        layout="Audio/SPEAKER/PHASE/*.wav, Tasks/ASR/{train_phase1,train_phase2,dev_phase1,dev_phase2,test}/"
        "{wav.scp,text,utt2spk,utt2subdialect} and Metadata/{spk2age,spk2gender,spk2city}",
        marks=("Audio", "Tasks/ASR"),
        tells=("gender", "age", "city", "label"),
        read=_read_kespeech,
    ),
    "librispeech": Published(
        title="LibriSpeech",
        licence="CC BY 4.0",
        source="https://www.openslr.org/12",
        citation="V. Panayotov et al., Librispeech: an ASR corpus based on public domain audio books, ICASSP 2015",
        layout="SPLIT/SPEAKER/CHAPTER/*.flac with SPEAKER-CHAPTER.trans.txt beside them, and SPEAKERS.TXT",
        marks=("SPEAKERS.TXT",),
        tells=("gender",),
        read=_read_librispeech,
    ),
    "speechocean762": Published(
        title="speechocean762: read English by Mandarin speakers, children and adults",
        licence="Apache-2.0",
        source="https://www.openslr.org/101",
        citation="J. Zhang et al., speechocean762: An Open-Source Non-native English Speech Corpus For Pronunciation "
        "Assessment, Interspeech 2021",
        layout="{train,test}/{wav.scp,text,utt2spk,spk2age,spk2gender} and WAVE/SPEAKERxxxx/*.WAV",
        marks=("train/wav.scp", "test/wav.scp", "WAVE"),
        tells=("gender", "age", "first_language"),
        read=_read_speechocean,
    ),
}
