"""A receipt says what ran, and cannot be made for a voice that did nothing."""

from __future__ import annotations

import json

import pytest

from manyvoice.errors import VoiceError
from manyvoice.submodels.method import make_method
from manyvoice.submodels.receipt import Receipt

HASH = "a" * 64
METHOD = make_method("lora", {"rank": 2, "alpha": 4.0, "roles": ("attention.query",)})


def test_a_receipt_of_a_voice_is_plain_json() -> None:
    receipt = Receipt(
        base="b" * 64, size="25", tenant="clinic", voice="ann", hash=HASH, method=METHOD,
        sites_ran=("2.attention.query", "0.attention.query"), sites_dropped=("1.attention.query",),
    )  # fmt: skip
    found = receipt.as_dict()
    assert found == json.loads(json.dumps(found)) == {
        "base": "b" * 64,
        "size": "25",
        "tenant": "clinic",
        "voice": "ann",
        "hash": HASH,
        "method": "lora",
        "settings": {"rank": 2, "alpha": 4.0, "roles": ["attention.query"]},
        "sites_ran": ["0.attention.query", "2.attention.query"],
        "sites_dropped": ["1.attention.query"],
        "voice_format": "voice.v1",
    }  # fmt: skip


def test_the_bare_base_has_no_voice_and_no_sites() -> None:
    found = Receipt(base="b", size=None, tenant="default").as_dict()
    assert found["voice"] is found["hash"] is found["method"] is found["settings"] is found["voice_format"] is None
    assert found["sites_ran"] == found["sites_dropped"] == []
    with pytest.raises(VoiceError, match="a receipt of the bare base names a voice's weights or sites"):
        Receipt(base="b", size=None, tenant="default", hash=HASH)


def test_a_voice_that_edited_nothing_gets_none() -> None:
    with pytest.raises(VoiceError, match=r"voice 'ann' \(aaaaaaaaaaaa\) edited nothing: size 25 has none of its 2"):
        Receipt(base="b", size="25", tenant="t", voice="ann", hash=HASH, method=METHOD, sites_dropped=("1.x", "2.x"))


def test_half_a_receipt_is_refused() -> None:
    with pytest.raises(VoiceError, match="'ann': its receipt lacks the hash or the method"):
        Receipt(base="b", size=None, tenant="t", voice="ann", method=METHOD, sites_ran=("0.x",))
    with pytest.raises(VoiceError, match=r"site 0\.x is said to have run and to be dropped"):
        Receipt(base="b", size=None, tenant="t", voice="ann", hash=HASH, method=METHOD, sites_ran=("0.x",),
                sites_dropped=("0.x",))  # fmt: skip
