import gzip
import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.lm import BOS, EOS, MISSING_UNK, UNK, NGram, train_ngram
from manyvoice.errors import DecodeError, WorkError

ARPA = r"""made by hand

\data\
ngram 1=5
ngram 2=3
ngram 3=1

\1-grams:
-1.0	<unk>
-99	<s>	-0.25
-0.5	</s>
-0.75	a	-0.125
-0.625	b	-0.5

\2-grams:
-0.25	<s> a	-0.0625
-0.375	a b	-0.1
-0.5	b </s>

\3-grams:
-0.05	<s> a b

\end\
"""


def arpa(tmp_path, text=ARPA):
    path = tmp_path / "lm.arpa"
    path.write_text(text, encoding="utf-8")
    return path


def log10(score):
    return pytest.approx(score * math.log(10), abs=1e-12)


def test_stored_ngrams_and_back_off(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path))
    assert lm.order == 3
    assert lm.vocabulary == {"a", "b", EOS, UNK}
    assert lm.score((BOS, "a"), "b") == log10(-0.05)
    assert lm.score(("a",), "b") == log10(-0.375)
    assert lm.score((BOS,), "b") == log10(-0.25 - 0.625), "one back-off"
    assert lm.score((BOS, "a"), "a") == log10(-0.0625 - 0.125 - 0.75), "two back-offs"
    assert lm.score(("b", "a"), "b") == log10(-0.375), "an unstored context backs off for nothing"


def test_a_context_that_only_has_a_back_off_still_pays_it(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path))
    assert lm.advance(("a",), "b") == ("a", "b")
    assert lm.sentence(["a", "b", "b"]) == log10(-0.25 - 0.05 + (-0.1 - 0.5 - 0.625) - 0.5)


def test_unknown_words(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path))
    assert lm.score((), "zebra") == log10(-1.0)
    assert lm.score(("b",), "zebra") == log10(-0.5 - 1.0)
    assert lm.advance(("a",), "zebra") == (), "nothing is stored after <unk>"
    assert lm.sentence(["zebra", "b"]) == log10(-0.25 - 1.0 - 0.625 - 0.5)


def test_a_model_without_unk_gives_what_kenlm_gives(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path, ARPA.replace("-1.0\t<unk>\n", "").replace("1=5", "1=4")))
    assert lm.score(("b",), "zebra") == MISSING_UNK == log10(-100)


def test_capital_unk_is_unk(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path, ARPA.replace("<unk>", "<UNK>")))
    assert lm.score((), "zebra") == log10(-1.0)


def test_a_model_without_sentence_ends(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path, "\\data\\\nngram 1=1\n\\1-grams:\n-0.5 a\n\\end\\\n"))
    assert lm.start() == ()
    assert lm.sentence(["a", "a"]) == log10(-1.0)


def test_a_no_break_space_is_part_of_its_word(tmp_path):
    lm = NGram.read_arpa(arpa(tmp_path, "\\data\\\nngram 1=1\n\\1-grams:\n-0.5\t10\u00a0km\n\\end\\\n"))
    assert "10\u00a0km" in lm.vocabulary


def test_gzip(tmp_path):
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.encode()))
    assert NGram.read_arpa(path).score(("a",), "b") == log10(-0.375)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("\\data\\", "data", 23, r"no \data\ line"),
        ("ngram 2=3", "ngram 3=3", 5, "expected 'ngram 2=COUNT' but found 'ngram 3=3'"),
        ("ngram 2=3", "ngram 2=4", 20, "3 2-grams, but the header says 4"),
        ("-0.75\ta", "zero\ta", 12, "log10 probability must be a finite number, but is 'zero'"),
        ("-0.75\ta", "nan\ta", 12, "log10 probability must be a finite number, but is 'nan'"),
        ("-0.75\ta", "0.75\ta", 12, "log10 probability must not be above 0, but is 0.75"),
        ("-0.125", "much", 12, "log10 back-off must be a finite number, but is 'much'"),
        ("a b\t-0.1", "a", 17, "expected log10, 2 words and perhaps a back-off"),
        ("a b\t-0.1", "a c\t-0.1", 17, "'c' is not among the 1-grams"),
        ("a b\t-0.1", "<s> a\t-0.1", 17, "'<s> a' is listed twice"),
        ("\\2-grams", "\\3-grams", 15, r"expected \2-grams: but found '\\3-grams:'"),
        ("\\end\\", "", 23, r"the file ends without \end\; it may be cut short"),
        ("\\end\\", "\\4-grams:", 23, r"expected \end\ but found '\\4-grams:'"),
    ],
)
def test_a_malformed_file_is_refused_by_line(tmp_path, old, new, line, message):
    assert old in ARPA
    path = arpa(tmp_path, ARPA.replace(old, new))
    with pytest.raises(DecodeError, match=rf"lm\.arpa:{line}: .*{re.escape(message)}"):
        NGram.read_arpa(path)


def test_a_header_that_is_cut_short(tmp_path):
    with pytest.raises(DecodeError, match=r"lm\.arpa:2: the file ends in its header"):
        NGram.read_arpa(arpa(tmp_path, "\\data\\\nngram 1=2\n"))
    with pytest.raises(DecodeError, match=r"lm\.arpa:2: no 'ngram 1=COUNT' line"):
        NGram.read_arpa(arpa(tmp_path, "\\data\\\n\\1-grams:\n"))


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(DecodeError, match=r"nowhere\.arpa: no such ARPA file"):
        NGram.read_arpa(tmp_path / "nowhere.arpa")
    (tmp_path / "lm.arpa").write_bytes(b"\\data\\\n\xff\n")
    with pytest.raises(DecodeError, match=r"lm\.arpa:\d: cannot be read as UTF-8 text"):
        NGram.read_arpa(tmp_path / "lm.arpa")
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(ARPA.encode())[:50])
    with pytest.raises(DecodeError, match=r"lm\.arpa\.gz:\d+: cannot be read"):
        NGram.read_arpa(tmp_path / "lm.arpa.gz")


def every_context(words, order):
    tails = itertools.chain.from_iterable(itertools.product([*words, UNK], repeat=n) for n in range(order))
    return [prefix + tail for tail in tails for prefix in ((), (BOS,)) if len(prefix + tail) < max(order, 2)]


@given(
    sentences=st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), max_size=8),
    order=st.integers(1, 4),
)
def test_probabilities_sum_to_one_after_any_context(sentences, order):
    lm = train_ngram([*sentences, "a b"], order)
    for context in every_context("abc", order):
        total = sum(math.exp(lm.score(context, word)) for word in lm.vocabulary)
        assert total == pytest.approx(1.0, abs=1e-12), context


@given(
    sentences=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=6),
    order=st.integers(1, 4),
    probe=st.lists(st.sampled_from("abcd"), max_size=6),
)
def test_a_cut_context_scores_as_the_whole_history(sentences, order, probe):
    lm = train_ngram(map(" ".join, sentences), order)
    context = lm.start()
    for n, word in enumerate(probe):
        known = [w if w in lm.vocabulary else UNK for w in [BOS, *probe[:n]]]
        known[0] = BOS
        history = tuple(known)[max(0, len(known) - order + 1) :]
        assert lm.score(context, word) == pytest.approx(lm.score(history, word), abs=1e-12)
        context = lm.advance(context, word)


def test_witten_bell_by_hand():
    lm = train_ngram(["a b", "a a"], 2)
    # Unigrams: a 3, b 1, </s> 2; three types, and a vocabulary of four with <unk>.
    unigram = {"a": (3 + 3 / 4) / 9, "b": (1 + 3 / 4) / 9, EOS: (2 + 3 / 4) / 9, UNK: (3 / 4) / 9}
    for word, p in unigram.items():
        assert math.exp(lm.score((), word)) == pytest.approx(p)
    # After a: a 1, b 1, </s> 1, so three types in three; b has been seen, <unk> backs off.
    assert math.exp(lm.score(("a",), "b")) == pytest.approx((1 + 3 * unigram["b"]) / 6)
    assert math.exp(lm.score(("a",), UNK)) == pytest.approx(3 * unigram[UNK] / 6)
    # After <s>: a twice.
    assert math.exp(lm.score((BOS,), "a")) == pytest.approx((2 + unigram["a"]) / 3)


def test_a_higher_order_knows_its_text_better():
    text = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog sat"] * 3
    scores = [sum(train_ngram(text, order).sentence(line.split()) for line in text) for order in (1, 2, 3)]
    assert scores == sorted(scores)


def test_folders_are_made_for_a_model_or_it_is_said_why_not(tmp_path):
    lm = train_ngram(["a b"], 2)
    lm.write_arpa(tmp_path / "new" / "folder" / "lm.arpa")
    assert NGram.read_arpa(tmp_path / "new" / "folder" / "lm.arpa").order == 2
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "lm.arpa", tmp_path / "new"):
        with pytest.raises(WorkError, match=f"{place}: cannot be written"):
            lm.write_arpa(place)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_trained_model_survives_its_file(tmp_path, order):
    lm = train_ngram(["a b c", "b c a b", "c", "", "ä b"], order)
    lm.write_arpa(tmp_path / "lm.arpa")
    back = NGram.read_arpa(tmp_path / "lm.arpa")
    assert (back.order, back.vocabulary) == (lm.order, lm.vocabulary)
    for context in every_context(["a", "b", "c", "ä"], order):
        for word in lm.vocabulary:
            assert back.score(context, word) == pytest.approx(lm.score(context, word), abs=1e-7)


def test_what_cannot_be_trained_on():
    with pytest.raises(DecodeError, match="order must be 1 or more, but is 0"):
        train_ngram(["a"], 0)
    with pytest.raises(DecodeError, match="no sentence to train a language model on"):
        train_ngram(["", " "], 2)
    with pytest.raises(DecodeError, match="sentence 2 holds '<s>', which is reserved"):
        train_ngram(["a", "<s> b"], 2)
