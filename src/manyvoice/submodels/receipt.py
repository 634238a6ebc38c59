"""Which weights answered: every result carries a receipt, and none can be made for a voice that did nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, final

from manyvoice.errors import VoiceError
from manyvoice.submodels.method import Edit
from manyvoice.submodels.voice import FORMAT


@final
@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What ran for one utterance, written down after it ran.

    Args:
        base: fingerprint of the base model.  size: name of the subnet that ran; None for the whole model.
        tenant: who asked.
        voice: the name that was asked for; None for the bare base, which has none of what follows.
        hash: of the voice file that the name meant when the request arrived.
        method: with its settings.
        sites_ran: keys of the sites that the voice edited, sorted.
        sites_dropped: those of the voice that this size does not have, sorted.
    Raises: VoiceError for a voice that edited no site: its answer would be the base's under the voice's name.
    """

    base: str
    size: str | None
    tenant: str
    voice: str | None = None
    hash: str | None = None
    method: Edit | None = None
    sites_ran: tuple[str, ...] = ()
    sites_dropped: tuple[str, ...] = ()
    voice_format: str | None = None

    def __post_init__(self) -> None:
        if self.voice is None:
            if self.hash or self.method or self.sites_ran or self.sites_dropped or self.voice_format:
                raise VoiceError("a receipt of the bare base names a voice's weights or sites; say which voice it was")
            return
        if not self.hash or self.method is None:
            raise VoiceError(f"voice {self.voice!r}: its receipt lacks the hash or the method; give both")
        if not self.sites_ran:
            size = "the whole model" if self.size is None else f"size {self.size}"
            raise VoiceError(
                f"voice {self.voice!r} ({self.hash[:12]}) edited nothing: {size} has none of its "
                f"{len(self.sites_dropped)} sites; use another size, or a voice made for this model"
            )
        if both := set(self.sites_ran) & set(self.sites_dropped):
            raise VoiceError(f"voice {self.voice!r}: site {min(both)} is said to have run and to be dropped")
        object.__setattr__(self, "sites_ran", tuple(sorted(self.sites_ran)))
        object.__setattr__(self, "sites_dropped", tuple(sorted(self.sites_dropped)))
        object.__setattr__(self, "voice_format", self.voice_format or FORMAT)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; the method is its name and its settings."""
        found = asdict(self)
        found["method"] = None if self.method is None else self.method.name
        found["settings"] = None if self.method is None else self.method.settings()
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain
