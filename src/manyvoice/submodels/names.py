"""What a store calls its files: any speaker's name, as a path's part that is safe wherever files are kept."""

from __future__ import annotations

import re
from hashlib import blake2b
from urllib.parse import unquote_to_bytes

from manyvoice.errors import UsageError

HASH = re.compile(r"[0-9a-f]{64}")
# Upper case is quoted, so that names differ on file systems that ignore case; dots are, so that a suffix is one.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_@")
# Bytes of a file's name: 255 is the usual limit, and what is written aside needs some.
_LONGEST, _KEPT = 180, 100


def quote(name: str) -> str:
    """A name as a path's part: what is neither ``a-z 0-9 - _ @`` becomes ``=`` and two hexadecimal digits.

    Raises: UsageError for a name that is empty, or no text.
    """
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"name {name!r}: is empty; give a name, such as ann")
    try:
        data = name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"name {name!r}: holds what is no character; give a name of letters, such as ann") from error
    quoted = "".join(chr(b) if b in _PLAIN else f"={b:02x}" for b in data)
    if len(quoted) <= _LONGEST:
        return quoted
    # two signs in a row come from no shorter name
    return f"{quoted[:_KEPT]}=={blake2b(data, digest_size=16).hexdigest()}"


def unquote(part: str) -> str | None:
    """The name that :func:`quote` made it of; None if it made it of none, or shortened it."""
    try:
        name = unquote_to_bytes(part.replace("%", "?").replace("=", "%")).decode()
        return name if quote(name) == part else None
    except (UnicodeDecodeError, UsageError):
        return None


def cached_as(hash: str, tenant: str) -> str:
    """The path of a copy inside a cache folder."""
    return f"{tenant_path(tenant)}/{_checked(hash)}.safetensors"


def _checked(hash: str) -> str:
    if not HASH.fullmatch(hash):
        raise UsageError(f"voice {hash!r}: a hash has 64 hexadecimal digits in lower case; ask for the voice by name")
    return hash


def tenant_path(tenant: str) -> str:
    """The folder of a tenant. UsageError for one that is empty or too long."""
    part = quote(tenant)
    if len(part) > _KEPT:
        raise UsageError(f"tenant {tenant!r}: is too long; give one of at most 33 characters")
    return part


def voice_path(hash: str, tenant: str) -> str:
    """The path of a voice. UsageError for what is no hash."""
    return f"{tenant_path(tenant)}/voices/{_checked(hash)}.safetensors"


def name_path(name: str, tenant: str) -> str:
    """The path of a name."""
    return f"{tenant_path(tenant)}/names/{quote(name)}.json"
