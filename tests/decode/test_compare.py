"""The comparison rule, held against its formulas, its symmetries and simulated truth."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyvoice.decode.compare import COMPARISON_CORPUS, Arm, Comparison, compare
from manyvoice.decode.wer import score
from manyvoice.errors import DecodeError


def arms(
    truth: float, rng: np.random.Generator, utterances: int = 300, seeds: int = 1, seed_sd: float = 0.0
) -> tuple[Arm, Arm]:
    """Two arms whose true error rates are 12 % * truth and 12 %, harder and easier utterances, seeds that vary."""
    words_N = rng.integers(4, 16, utterances)
    hard_N = words_N * rng.gamma(2, 0.5, utterances)

    def errors(rate: float) -> np.ndarray:
        luck_G1 = np.exp(rng.normal(size=(seeds, 1)) * seed_sd - seed_sd**2 / 2)
        return rng.poisson(rate * hard_N * luck_G1)

    return Arm("new", errors(0.12 * truth), words_N), Arm("base", errors(0.12), words_N)


def verdicts(truth: float, runs: int, seeds: int = 1, seed_sd: float = 0.0, utterances: int = 300) -> list[Comparison]:
    rng = np.random.default_rng(7)
    return [
        compare(*arms(truth, rng, utterances, seeds, seed_sd), samples=200, seed=run, synthetic=False, margin=0.2)
        for run in range(runs)
    ]


def plain(new_N: np.ndarray, base_N: np.ndarray, samples: int = 4000) -> np.ndarray:
    """A paired percentile bootstrap in three lines: one-sided 95 % bounds."""
    rng = np.random.default_rng(11)
    draws = [rng.integers(len(new_N), size=len(new_N)) for _ in range(samples)]
    return np.quantile([new_N[d].sum() / base_N[d].sum() - 1 for d in draws], [0.05, 0.95])


def test_with_one_seed_the_bounds_are_those_of_a_plain_paired_bootstrap():
    new, base = arms(1.0, np.random.default_rng(0))
    found = compare(new, base, synthetic=False)
    assert found.difference == pytest.approx(new.errors.sum() / base.errors.sum() - 1)
    assert [found.lower, found.upper] == pytest.approx(list(plain(new.errors[0], base.errors[0])), abs=0.012)
    assert found.interval[0] < found.lower < found.difference < found.upper < found.interval[1]
    assert found.reason.endswith("one training seed, so this speaks of these two trained models only")


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.0), (3, 0.1)])
def test_an_arm_at_the_margin_is_called_not_inferior_one_time_in_twenty(seeds, seed_sd):
    # 400 runs at a true rate of 5 %: standard error 1.1 %; above 8.5 % is three of them.
    results = verdicts(1.2, 400, seeds, seed_sd)
    assert np.mean([found.upper < 0.2 for found in results]) < 0.085
    assert np.mean([found.lower > 0.2 for found in results]) < 0.085
    assert np.mean([found.holds for found in results]) < 0.085


def test_plain_resampling_of_three_seeds_would_break_that_promise():
    # Why seeds are drawn from Student's t: this is the alternative, on seeds that vary around exactly the margin.
    rng = np.random.default_rng(3)
    d_R3 = rng.normal(size=(1000, 3))
    means = d_R3[:, np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)].mean(-1)
    assert np.mean(np.quantile(means, 0.95, axis=1) < 0) > 0.12


def test_far_better_is_better_and_far_worse_is_inferior():
    assert Counter(found.verdict for found in verdicts(0.5, 20))["better"] == 20
    assert Counter(found.verdict for found in verdicts(0.5, 20, seeds=3, seed_sd=0.02))["better"] >= 19
    assert Counter(found.verdict for found in verdicts(2.2, 20))["inferior"] >= 19


def test_equal_arms_are_not_inferior_with_enough_data_and_undecided_with_little():
    assert Counter(found.verdict for found in verdicts(1.0, 10, utterances=6000))["not inferior"] >= 8
    few = verdicts(1.0, 30, utterances=40)
    assert Counter(found.verdict for found in few)["undecided"] >= 25
    assert few[0].smallest_detectable > 0.2


def test_an_interval_wider_than_the_margin_does_not_hold_even_where_it_clears_it():
    rng = np.random.default_rng(5)
    found = [compare(*arms(0.9, rng), samples=400, synthetic=False, margin=0.09) for _ in range(30)]
    lucky = [f for f in found if 0 <= f.upper < f.margin < f.upper - f.difference]
    assert lucky
    assert {f.verdict for f in lucky} == {"undecided"}
    assert all("wider than the margin of 9%" in f.reason and not f.holds for f in lucky)


def test_a_difference_of_the_detectable_size_is_seen_four_times_in_five():
    detectable = float(np.median([found.smallest_detectable for found in verdicts(1.15, 50)]))
    seen = np.mean([found.lower > 0 for found in verdicts(1 + detectable, 300)])
    assert seen == pytest.approx(0.8, abs=0.09)


def test_seeds_that_differ_widen_the_interval_and_seeds_that_agree_leave_the_utterances():
    new, base = arms(1.0, np.random.default_rng(1))
    one = compare(new, base, synthetic=False)
    same = [replace(arm, errors=np.repeat(arm.errors, 3, axis=0)) for arm in (new, base)]
    agree = compare(*same, synthetic=False)
    assert (agree.lower, agree.upper) == pytest.approx((one.lower, one.upper), abs=1e-9)
    assert agree.seeds == 3 and "one training seed" not in agree.reason
    factors = np.array([[1], [2], [3]])
    differ = compare(replace(same[0], errors=same[0].errors * factors), same[1], synthetic=False)
    assert differ.upper - differ.difference > 5 * (agree.upper - agree.difference)


def test_seeds_that_vary_in_both_arms_together_cancel():
    new, base = arms(1.0, np.random.default_rng(2))
    factors = np.array([[1], [2], [3]])
    together = compare(
        replace(new, errors=new.errors * factors), replace(base, errors=base.errors * factors), synthetic=False
    )
    alone = compare(new, base, synthetic=False)
    assert together.upper == pytest.approx(alone.upper, abs=0.02)


def test_lucky_agreement_of_seeds_never_beats_the_utterances_alone():
    rng = np.random.default_rng(4)
    for _ in range(20):
        new, base = arms(1.0, rng, utterances=100, seeds=2)
        pooled = [replace(arm, errors=arm.errors.sum(0, keepdims=True)) for arm in (new, base)]
        nested, alone = (compare(*pair, samples=400, synthetic=False) for pair in ((new, base), pooled))
        assert nested.upper - nested.lower >= alone.upper - alone.lower - 1e-12


@st.composite
def small_tests(draw):
    seeds, utterances = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    counts = st.lists(st.integers(0, 9), min_size=utterances, max_size=utterances)
    rows = st.lists(counts, min_size=seeds, max_size=seeds)
    words = np.array(draw(counts)) + 1
    return Arm("a", np.array(draw(rows)), words), Arm("b", np.array(draw(rows)), words)


@settings(max_examples=60, deadline=None)
@given(pair=small_tests(), margin=st.floats(0.01, 0.5))
def test_exchanging_the_arms_mirrors_everything(pair, margin):
    there = compare(*pair, samples=100, synthetic=False, margin=margin)
    back = compare(*pair[::-1], samples=100, synthetic=False, margin=margin)
    assert 1 + back.difference == pytest.approx(1 / (1 + there.difference))
    assert 1 + back.upper == pytest.approx(1 / (1 + there.lower))
    assert 1 + back.lower == pytest.approx(1 / (1 + there.upper))
    assert back.smallest_detectable == pytest.approx(there.smallest_detectable)
    assert not (there.verdict == "better" and back.verdict == "better")
    if there.verdict == "inferior" and back.verdict != "void":
        assert back.verdict == "better"


@settings(max_examples=60, deadline=None)
@given(pair=small_tests(), data=st.data())
def test_the_order_of_utterances_and_of_seeds_does_not_matter(pair, data):
    seeds, utterances = pair[0].errors.shape
    order_N = np.array(data.draw(st.permutations(range(utterances))))
    order_G = np.array(data.draw(st.permutations(range(seeds))))
    shuffled = [Arm(arm.name, arm.errors[order_G][:, order_N], arm.reference_words[order_N]) for arm in pair]
    first, second = (compare(*arms_, samples=100, synthetic=False) for arms_ in (pair, shuffled))
    assert (first.lower, first.upper) == pytest.approx((second.lower, second.upper))
    assert first.verdict == second.verdict


@settings(max_examples=40, deadline=None)
@given(pair=small_tests())
def test_an_arm_is_never_better_or_inferior_to_itself(pair):
    found = compare(pair[0], replace(pair[0], name="itself"), samples=100, synthetic=False)
    assert found.lower == found.difference == found.upper == found.smallest_detectable == 0
    assert found.verdict in {"not inferior", "undecided", "void"}


def test_synthetic_speech_needs_twenty_thousand_words():
    new, base = arms(0.4, np.random.default_rng(0))
    assert compare(new, base, synthetic=False).verdict == "better"
    found = compare(new, base, synthetic=True)
    assert (found.verdict, found.holds) == ("undecided", False)
    assert f"{found.words:,} words of synthetic speech, and the rule asks for 20,000" in found.reason
    large = arms(0.4, np.random.default_rng(0), utterances=2400)
    assert compare(*large, synthetic=True).verdict == "better"


@pytest.mark.parametrize(("rate", "end"), [(1, "floor"), (30, "ceiling")])
def test_at_a_floor_or_a_ceiling_the_table_is_void(rate, end):
    words_N = np.full(400, 100)
    base = Arm("large", np.full((1, 400), rate), words_N)
    found = compare(Arm("small", base.errors // 2, words_N), base, synthetic=True, void_outside=COMPARISON_CORPUS)
    assert (found.verdict, found.holds) == ("void", False)
    assert f"large is at a {end}: its error rate of {rate}.00% is outside 5% to 25%" in found.reason


def test_arms_without_errors_are_void_and_few_errors_undecided():
    words_N = np.full(400, 100)
    none, some = np.zeros((1, 400), int), np.zeros((1, 400), int)
    some[0, :19] = 1
    perfect = Arm("perfect", none, words_N)
    assert compare(Arm("new", some, words_N), perfect, synthetic=True).verdict == "void"
    found = compare(perfect, Arm("base", some, words_N), synthetic=True)
    assert found.verdict == "undecided" and "19 errors in both arms together" in found.reason
    assert compare(perfect, Arm("base", some + 1, words_N), synthetic=True).verdict == "better"


def test_a_comparison_is_json_and_a_sentence():
    found = compare(*arms(1.0, np.random.default_rng(0), seeds=3), synthetic=False)
    stored = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert stored["verdict"] == found.verdict and stored["holds"] is found.holds
    assert stored["interval"] == list(found.interval)
    text = found.sentence()
    assert text.startswith(f"new {found.new_rate:.2%} against base {found.base_rate:.2%}")
    assert f"could have seen is {found.smallest_detectable:.1%}" in text
    assert "300 utterances, 3 training seeds" in text


def test_the_same_seed_gives_the_same_draws():
    pair = arms(1.0, np.random.default_rng(0), seeds=3)
    assert compare(*pair, synthetic=False, samples=200) == compare(*pair, synthetic=False, samples=200)
    other = compare(*pair, synthetic=False, samples=200, seed=1)
    assert other.upper != compare(*pair, synthetic=False, samples=200).upper


def test_an_arm_is_made_from_the_scores_of_its_seeds():
    said, ids = ["one two", "three"], ["u1", "u2"]
    scores = [score(said, heard, ids=ids) for heard in (["one", "three four"], ["one two", "tree"])]
    arm = Arm.of("lora", scores)
    assert arm.errors.tolist() == [[1, 1], [0, 1]] and arm.reference_words.tolist() == [2, 1]
    assert arm.rate == pytest.approx(3 / 6)
    with pytest.raises(DecodeError, match="lora: seed 1 differs from seed 0 in ids"):
        Arm.of("lora", [scores[0], score(said, said, ids=["u2", "u1"])])
    with pytest.raises(DecodeError, match="lora: seed 1 differs from seed 0 in normaliser"):
        Arm.of("lora", [scores[0], score(said, said, ids=ids, normaliser="none")])
    with pytest.raises(DecodeError, match="lora: no scores"):
        Arm.of("lora", [])


def test_arms_that_were_not_tested_alike_are_refused():
    new, base = arms(1.0, np.random.default_rng(0))
    other = replace(base, reference_words=base.reference_words + 1)
    with pytest.raises(DecodeError, match="new and base differ in reference_words"):
        compare(new, other, synthetic=False)
    with pytest.raises(DecodeError, match="new has 3 training seeds and base 1; seeds are paired by row"):
        compare(replace(new, errors=np.repeat(new.errors, 3, axis=0)), base, synthetic=False)


@pytest.mark.parametrize(
    ("errors", "words", "text"),
    [
        ([1, 2], [3, 4], r"a.errors has shape \[2\]; it must be \[seeds, utterances\]"),
        ([[1, 2]], [[3, 4]], r"a.reference_words has shape \[1, 2\]"),
        ([[1, 2]], [3], "a.errors has 2 utterances and a.reference_words 1"),
        ([[1, -2]], [3, 4], "smallest -2; counts are whole and not negative"),
        ([[0.5, 0.1]], [3, 4], "float64, smallest 0.1; counts are whole"),
        ([[1, 2]], [0, 0], "a.reference_words are all 0"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(errors, words, text):
    with pytest.raises(DecodeError, match=text):
        Arm("a", np.array(errors), np.array(words))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"level": 1.0}, "level = 1.0: a confidence level lies between 0 and 1"),
        ({"level": 0.5}, "level = 0.5: a one-sided bound at or below 0.5"),
        ({"margin": 0.0}, "margin = 0.0: the accepted relative difference must be above 0"),
        ({"samples": 99}, "samples = 99: .* use at least 100"),
    ],
)
def test_settings_out_of_range_are_refused(setting, text):
    with pytest.raises(DecodeError, match=text):
        compare(*arms(1.0, np.random.default_rng(0)), synthetic=False, **setting)
