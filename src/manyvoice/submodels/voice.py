"""A voice: one submodel by itself, as a file that anybody can check.

One safetensors file, called by the sha256 of its bytes; the same voice gives the same bytes. Its metadata say which
method with which settings, which base and tokenizer it was made for, and its card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from manyvoice.errors import UsageError, VoiceError
from manyvoice.models.anatomy import Anatomy
from manyvoice.submodels.bank import Where, parts_of
from manyvoice.submodels.method import Edit, make_method

FORMAT = "voice.v1"
# all in one entry: the order of several would not be the same from one writing to the next
_ENTRY = "manyvoice"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """One submodel.

    Args:
        method: with its settings; one that stands by itself (:meth:`Edit.alone`).
        tensors: of one submodel, by (site key, part).
        base, tokenizer: fingerprints of the base model's weights and of its vocabulary.
        card: what else is known: speaker, licence, seconds of speech, metrics; plain JSON values.
    """

    method: Edit
    tensors: Mapping[Where, Tensor]
    base: str
    tokenizer: str
    card: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The file. VoiceError for weights that are not finite."""
        document = {
            "format": FORMAT,
            "method": self.method.name,
            "settings": self.method.settings(),
            "base": self.base,
            "tokenizer": self.tokenizer,
            "card": dict(self.card),
        }
        tensors = {f"{key}/{part}": t.detach().cpu().contiguous() for (key, part), t in self.tensors.items()}
        _check_finite(tensors, "this voice")
        document["digest"] = digest_of_file(document, tensors)
        return save(tensors, {_ENTRY: json.dumps(document, sort_keys=True, ensure_ascii=False)})

    @cached_property
    def hash(self) -> str:
        """sha256 of the file, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def slimmed(self) -> Voice:
        """The same voice without the bytes of its file, for keeping many; its hash is still that of what was read."""
        slim = replace(self)
        slim.__dict__["hash"] = self.hash
        return slim

    def check(self, anatomy: Anatomy, *, base: str, tokenizer: str) -> Voice:
        """The voice, if it was made for that model.

        Args: base: fingerprint of the model, or of the supernet that it is a size of.
        Raises: VoiceError names what does not fit.
        """
        if self.base != base:
            raise VoiceError(
                f"voice {self.hash[:12]} was made for the base {self.base[:12]}, but this model is {base[:12]}; use "
                "that base, or make the voice again with `manyvoice personalize`"
            )
        if self.tokenizer != tokenizer:
            raise VoiceError(
                f"voice {self.hash[:12]} was made for the tokenizer {self.tokenizer[:12]}, but this model has "
                f"{tokenizer[:12]}; use the folder that it was made with"
            )
        expected = {where: part.shape for where, part in parts_of(self.method, self.method.sites(anatomy)).items()}
        found = {where: tuple(t.shape) for where, t in self.tensors.items()}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise VoiceError(
                f"voice {self.hash[:12]} does not fit the model at {wrong[0][0]}, {wrong[0][1]} {list(wrong[1])}; the "
                "file says another method or base than it was made with"
            )
        return self

    @classmethod
    def from_bytes(cls, data: bytes, where: str, *, hash: str | None = None) -> Voice:
        """A voice from the bytes of a file.

        Args: where: the file, for messages.  hash: that the bytes must have.
        Raises: VoiceError for a file that is truncated, changed, foreign, of another version or not finite.
        """
        if hash is not None and (got := hashlib.sha256(data).hexdigest()) != hash:
            raise VoiceError(
                f"{where}: holds {got[:12]} instead of {hash[:12]}: it was changed, or not written to its end; copy "
                "the voice again from where it is whole"
            )
        document = read_metadata(data, where)
        try:
            stored = load(data)
            method = make_method(document["method"], document["settings"])
            base, tokenizer, card = document["base"], document["tokenizer"], document["card"]
            if not (isinstance(base, str) and isinstance(tokenizer, str) and isinstance(card, dict)):
                raise ValueError("its base and tokenizer must be text, and its card an object")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise VoiceError(f"{where}: is no voice that this version can read ({error})") from error
        if not stored:
            raise VoiceError(f"{where}: holds no tensors; make the voice again")
        if odd := [name for name, tensor in stored.items() if not tensor.is_floating_point()]:
            raise VoiceError(f"{where}: {odd[0]} holds {stored[odd[0]].dtype}, no fractions; make the voice again")
        _check_finite(stored, where)
        # bytes that have the hash they were asked by need no second look
        if hash is None and document.pop("digest", "") != digest_of_file(document, stored):
            raise VoiceError(f"{where}: was changed since it was written; copy the voice again from where it is whole")
        tensors: dict[Where, Tensor] = {}
        for name, tensor in stored.items():
            key, _, part = name.rpartition("/")
            tensors[key, part] = tensor
        voice = cls(method=method, tensors=tensors, base=base, tokenizer=tokenizer, card=card)
        # what was read is what its hash is of, not how it would be written now
        voice.__dict__["data"] = data
        if hash is not None:
            voice.__dict__["hash"] = hash
        return voice

    @classmethod
    def read(cls, path: Path) -> Voice:
        """A voice from a file; raises as :meth:`from_bytes`."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise VoiceError(f"{path}: cannot be read ({error}); give the path of a voice file") from error
        return cls.from_bytes(data, str(path))

    def write(self, path: Path) -> Path:
        """The file, written aside and renamed."""
        aside = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(self.data)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise VoiceError(f"{path}: cannot be written ({error}); make room or choose another place") from error
        return path


def read_metadata(data: bytes, where: str) -> dict[str, Any]:
    """What a voice file says of itself, from its beginning alone: ``data`` may be cut off after the header.

    Raises: VoiceError if it is no voice.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        document = json.loads(header["__metadata__"][_ENTRY])
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise VoiceError(
            f"{where}: is no voice file, or not written to its end; give a .safetensors file that `manyvoice "
            "personalize` or `voices export` wrote"
        ) from error
    if version != FORMAT:
        raise VoiceError(f"{where}: format {version!r}, but this version reads {FORMAT}; make the voice again")
    found: dict[str, Any] = document
    return found


def size_of(data: bytes) -> int:
    """Bytes that a file with this header has if it is whole. Only for what :func:`read_metadata` has read."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    return size + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def digest_of_file(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hexadecimal, of what a file says of itself and of its tensors by name; it stands in the file."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    # one pass over all of them; which it was is asked only if something is wrong, or too large to be added up
    together = torch.cat([torch.zeros(1), *(t.reshape(-1).float() for t in tensors.values())])
    if together.sum().isfinite():
        return
    for name, tensor in tensors.items():
        # as the models compute: a double that single precision does not hold is infinite there
        if not tensor.float().isfinite().all():
            raise VoiceError(f"{where}: {name} holds numbers that are not finite; train it again, more slowly")
