import pytest

from manyvoice.decode.pieces import check_boundary, letters, opens_word, spell
from manyvoice.errors import DecodeError

PIECES = ["▁", "▁new", "▁y", "o", "rk"]


def test_a_mark_opens_a_word():
    assert [opens_word(piece, "prefix") for piece in PIECES] == [True, True, True, False, False]
    assert [letters(piece, "prefix") for piece in PIECES] == ["", "new", "y", "o", "rk"]
    assert spell([1, 2, 3, 4], PIECES, "prefix") == "new york"


def test_a_lone_mark_is_a_space_and_two_are_one():
    assert spell([3, 0, 3, 0, 1, 0], PIECES, "prefix") == "o o new"


def test_every_token_a_word():
    assert spell([1, 0], ["world", "hello"], "every") == "hello world"
    assert opens_word("rk", "every")


def test_a_mark_inside_a_piece_is_refused():
    with pytest.raises(DecodeError, match=r"tokens\[1\] is 'of▁the': .* U\+2581 may only start a piece"):
        check_boundary(["a", "of▁the"], "prefix")
    check_boundary(["of▁the"], "every")


def test_an_unknown_rule_is_refused():
    with pytest.raises(DecodeError, match="word_boundary is 'suffix', but must be 'prefix' or 'every'"):
        check_boundary([], "suffix")  # type: ignore[arg-type]
