"""What people do with a store of voices: list, show, add, remove, export and import them.

Each function returns plain JSON values; the command prints them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from manyvoice.errors import UsageError, VoiceError
from manyvoice.submodels.index import Entry
from manyvoice.submodels.names import quote
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice

_SHARED = (
    "the generator that made this voice was trained on this speaker too, and removing the voice does not unlearn that; "
    "train the generator again without the speaker"
)


def list_voices(store: Store, tenant: str) -> dict[str, Any]:
    """All names of a tenant; for one that has none, which tenants there are."""
    entries = store.entries(tenant)
    found: dict[str, Any] = {"store": store.url, "tenant": tenant, "voices": [asdict(entry) for entry in entries]}
    return found if entries else {**found, "tenants": store.tenants()}


def show_voice(store: Store, name: str, tenant: str) -> dict[str, Any]:
    """All that a voice says of itself. VoiceError if its file is not what its hash says."""
    entry = store.entry(name, tenant)
    voice = store.load(entry.hash, tenant)
    return {
        "name": entry.name,
        "tenant": tenant,
        "hash": entry.hash,
        "added": entry.added,
        "bytes": entry.bytes,
        "method": voice.method.name,
        "settings": voice.method.settings(),
        "base": voice.base,
        "tokenizer": voice.tokenizer,
        "tensors": len(voice.tensors),
        "parameters": sum(t.numel() for t in voice.tensors.values()),
        "card": dict(voice.card),
    }


def add_voices(store: Store, files: Sequence[Path], tenant: str, *, name: str | None = None) -> list[dict[str, Any]]:
    """Keep voice files, each under the name given, its speaker's, or else the file's without its suffix.

    All are read before one is added, so that a wrong file among many changes nothing.

    Raises: UsageError if two would have one name; VoiceError for a file that is no voice.
    """
    names = [name or _name_of(Voice.read(path), path) for path in files]
    for called, count in Counter(names).items():
        if count > 1:
            of = " and ".join([str(path) for path, one in zip(files, names, strict=True) if one == called][:2])
            raise UsageError(
                f"{of}: would both be called {called!r}; add one of them with `manyvoice voices {store.url} add FILE "
                "--name NAME`"
            )

    def read() -> Iterator[tuple[str, Voice]]:
        for path, called in zip(files, names, strict=True):
            yield called, Voice.read(path)

    added = store.add_many(read(), tenant)
    return [{"file": str(path), **asdict(one)} for path, one in zip(files, added, strict=True)]


def remove_voices(store: Store, names: Sequence[str], tenant: str) -> list[dict[str, Any]]:
    """Forget names and the voices that only they stood for.

    Each says what is ``gone``, and in ``note`` what removing it does not undo. Nothing is removed if a name is unknown.
    """
    unique = list(dict.fromkeys(names))
    known = [_before_removal(store, name, tenant) for name in unique]
    done = []
    for name, entry in zip(unique, known, strict=True):
        gone = store.remove(name, tenant)
        notes = [] if gone else ["another name of this tenant stands for the same voice, which stays"]
        if entry is not None and entry.card.get("shared") is True:
            notes.append(_SHARED)
        hash = None if entry is None else entry.hash
        done.append({"name": name, "hash": hash, "bytes": entry.bytes if entry and gone else 0, "gone": gone,
                     "note": "; ".join(notes)})  # fmt: skip
    return done


def export_voice(store: Store, name: str, tenant: str, file: Path | None = None) -> dict[str, Any]:
    """Write a voice's file, byte for byte as the store has it, here under its name if no file is given."""
    voice, path = store.get(name, tenant), file or Path(f"{quote(name)}.safetensors")
    if path.exists() and (not path.is_file() or path.read_bytes() != voice.data):
        raise UsageError(f"{path} is there already and holds something else; name another file with --output")
    voice.write(path)
    return {"name": name, "hash": voice.hash, "bytes": len(voice.data), "file": str(path)}


def error_rates(card: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of the base and with the voice, if its card has both."""
    metrics = card.get("metrics")
    if not isinstance(metrics, Mapping):
        return None
    before, after = metrics.get("base_wer"), metrics.get("wer")
    if isinstance(before, int | float) and isinstance(after, int | float):
        return float(before), float(after)
    return None


def _name_of(voice: Voice, path: Path) -> str:
    speaker = voice.card.get("speaker")
    return speaker if isinstance(speaker, str) and speaker.strip() else path.stem


def _before_removal(store: Store, name: str, tenant: str) -> Entry | None:
    """What is known of it; None if its files are damaged, which is no reason to keep them."""
    try:
        found = store.entry(name, tenant)
    except VoiceError:
        return None
    if not found.name:
        raise UsageError(f"voices rm {name}: is a hash; give the name to remove, which `ls` shows")
    return found
