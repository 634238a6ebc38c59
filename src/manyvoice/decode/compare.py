"""The one rule by which error rates are compared.

Dimension letters of this file: G training seeds, N test utterances, M bootstrap draws.

**Statistic.** ``difference = sum(E_new) / sum(E_base) - 1``, with errors E summed over all seeds and utterances. Both
arms were tested on the same utterances, so the reference words cancel and this is the relative difference of the two
error rates. It is resampled as ``L = log(sum E_new / sum E_base)``, because L changes only its sign when the arms are
exchanged.

**Utterances.** A draw takes N utterances with replacement, the same for both arms (paired: an utterance that is hard
is hard for both) and the same for all seeds (all of them were tested on this one set, so an easy draw of utterances
is easy for every seed). Bisani and Ney, ICASSP 2004.

**Seeds.** Training seeds are the outer level, paired by row: row g of both arms was trained with the same seed. With
``d_g = G E_new,g / sum(E_new) - G E_base,g / sum(E_base)``, which is how far L of seed g lies from L of all (delta
method), and s the standard deviation of d over the G seeds (divisor G - 1), a draw is

    L* = L + sqrt(1 - c) (L_utterances* - L) + t* s / sqrt(G),        t* drawn from Student's t, G - 1 degrees

Why t and not plain resampling of the seeds: no mean of three seeds drawn with replacement can lie beyond the most
extreme of the three, and one time in eight the truth lies beyond them all. Where seeds vary more than utterances,
plain resampling of three seeds therefore calls an arm that is exactly at the margin "not inferior" in about 15 % of
the cases instead of 5 %. The draw from t is its small-sample form: it tends to plain resampling as G grows.
Why c: seeds also differ because each errs on other utterances. That part of the noise is inside s already, and c is
its share of the utterance variance (`_shared`, in closed form), so it is not counted twice. Three seeds that agree
by luck must not promise more than the test set can show: if resampling the utterances alone (c = 0, s = 0) spreads L
more widely, its draws are used.
With one seed there is no outer level: the interval speaks of these two trained models, and the verdict says so.

**Bounds.** ``upper`` and ``lower`` are the one-sided percentile bounds at `level`, ``exp(quantile of L*) - 1``. Half
of the draws are made with the arms exchanged and turned round, so that exchanging the arms mirrors every bound
exactly: ``1 + lower = 1 / (1 + upper of the exchange)``.

**Verdict**, the first that applies:

    void          the base arm's error rate is outside the range, or it makes no error at all: a floor or a ceiling
    undecided     synthetic speech with fewer than 20,000 reference words, or fewer than 20 errors in both arms
    better        upper < 0
    not inferior  upper < margin, and upper - difference <= margin
    inferior      lower > margin
    undecided     otherwise

The second condition of "not inferior" is the width of the one-sided interval: one that is wider than the margin could
not have decided between equal arms, so clearing the margin with it is luck. A difference that is larger than the
interval ("better", "inferior") is decided however wide it is. Only "better" and "not inferior" hold.

**Smallest detectable difference.** The true relative increase that the one-sided test against "no increase" would
have found with 80 % probability: ``exp(r(level) + r(0.8)) - 1``, r(p) being half the distance between the p and
1 - p quantiles of L*.

The unit of resampling is the utterance. If a few speakers carry the difference, look at `Score.by_speaker` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manyvoice.decode.wer import Score, check_level, resampled_sums
from manyvoice.errors import DecodeError

Verdict = Literal["better", "not inferior", "inferior", "undecided", "void"]
Floats = NDArray[np.float64]

MARGIN = 0.05  # the project's rule: 5 % relative
COMPARISON_CORPUS = (0.05, 0.25)  # error rates of the reference model between which a comparison corpus can tell
SYNTHETIC_WORDS = 20_000  # the project's rule: synthetic speech costs nothing, so there is no excuse for less
FEWEST_ERRORS = 20  # below this a percentile bootstrap of a ratio of counts is not to be trusted; our choice
POWER = 0.8  # the usual convention for "could have seen" (Cohen 1988)
HOLDS: frozenset[Verdict] = frozenset({"better", "not inferior"})


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: what was trained, once for each seed, and the errors it made.

    Args:
        name: how reports call it.
        errors: G N, substitutions + deletions + insertions of each training seed on each utterance. A model that is
            not trained in the experiment may repeat its one row; one that is trained may not.
        reference_words: N, words of each reference.

    Raises: DecodeError for other shapes, negative or fractional counts, or no words at all.
    """

    name: str
    errors: NDArray[np.int64]
    reference_words: NDArray[np.int64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", _whole(f"{self.name}.errors", self.errors, 2))
        object.__setattr__(self, "reference_words", _whole(f"{self.name}.reference_words", self.reference_words, 1))
        if self.errors.shape[1] != self.reference_words.shape[0]:
            raise DecodeError(
                f"{self.name}.errors has {self.errors.shape[1]} utterances and {self.name}.reference_words "
                f"{self.reference_words.shape[0]}; they must be the same utterances; pass [seeds, utterances]"
            )
        if self.reference_words.sum() == 0:
            raise DecodeError(f"{self.name}.reference_words are all 0; error rates need words; check the references")

    @classmethod
    def of(cls, name: str, scores: Sequence[Score]) -> Arm:
        """From the score of each training seed on the same test set.

        Raises: DecodeError if there is no score, or they differ in utterances, texts, normaliser or unit.
        """
        if not scores:
            raise DecodeError(f"{name}: no scores; an arm is the score of each training seed; give at least one")
        first = scores[0]
        for n, other in enumerate(scores):
            for field in ("ids", "references", "normaliser", "unit"):
                if getattr(other, field) != getattr(first, field):
                    raise DecodeError(
                        f"{name}: seed {n} differs from seed 0 in {field}; all seeds must be scored on the same "
                        "utterances in the same order and in the same way; score them again"
                    )
        errors = np.array([[c.errors for c in s.counts] for s in scores], dtype=np.int64)
        return cls(name, errors, np.array([c.reference for c in first.counts], dtype=np.int64))

    @property
    def rate(self) -> float:
        """Mean error rate over the seeds."""
        return float(self.errors.sum() / (len(self.errors) * self.reference_words.sum()))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the rule found; every number a report needs. Rates and differences are fractions: 0.05 is 5 %.

    Args:
        difference: relative, new to base; negative is fewer errors.  lower, upper: its one-sided bounds at `level`.
        interval: its two-sided interval at `level`.
        smallest_detectable: the smallest relative increase that this test could have seen, at 80 % power; where errors
            are few it is large, 1 being twice as many.
        words: reference words of the test set, counted once.
    """

    new: str
    base: str
    new_rate: float
    base_rate: float
    difference: float
    lower: float
    upper: float
    interval: tuple[float, float]
    margin: float
    level: float
    verdict: Verdict
    smallest_detectable: float
    words: int
    utterances: int
    seeds: int
    synthetic: bool
    reason: str

    @property
    def holds(self) -> bool:
        """Whether it is shown that the new arm is not inferior."""
        return self.verdict in HOLDS

    def as_dict(self) -> dict[str, object]:
        """For JSON, `holds` included."""
        return {**asdict(self), "interval": list(self.interval), "holds": self.holds}

    def sentence(self) -> str:
        """The comparison in words, for a table's caption or a terminal."""
        return (
            f"{self.new} {self.new_rate:.2%} against {self.base} {self.base_rate:.2%}: {self.difference:+.1%} relative "
            f"(one-sided {self.level:.0%} bounds {self.lower:+.1%} and {self.upper:+.1%}); {self.verdict}: "
            f"{self.reason}. The smallest increase of errors it could have seen is {self.smallest_detectable:.1%} "
            f"({self.words:,} words, {self.utterances:,} utterances, {_seeds(self.seeds)})."
        )


def compare(
    new: Arm,
    base: Arm,
    *,
    margin: float = MARGIN,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    synthetic: bool,
    void_outside: tuple[float, float] | None = None,
) -> Comparison:
    """Is `new` not inferior to `base`? The rule and its formulas stand at the top of this module.

    Args:
        margin: the relative difference that would still be accepted.
        level: confidence of the one-sided bounds and of the two-sided interval.
        samples: bootstrap draws M.  seed: of the draws.
        synthetic: whether the test speech is synthetic, which asks for 20,000 words.
        void_outside: the error rates between which `base` must lie; `COMPARISON_CORPUS` on a comparison corpus.

    Raises: DecodeError if the arms were not tested alike, or a setting is out of its range.
    """
    _check_alike(new, base)
    _check_settings(margin, level, samples)
    draws_M = _draws(new.errors, base.errors, samples, seed)
    ends = [1 - level, level, (1 - level) / 2, (1 + level) / 2, 1 - POWER, POWER]
    low, high, low2, high2, weak, strong = (float(q) for q in np.quantile(draws_M, ends))
    difference = float(np.expm1(_log_ratio(new.errors.sum(), base.errors.sum())))
    lower, upper = float(np.expm1(low)), float(np.expm1(high))
    words = int(base.reference_words.sum())
    verdict, reason = (
        _refusal(new, base, void_outside)
        or _too_little(new, base, words if synthetic else None)
        or _decision(difference, lower, upper, margin)
    )
    if len(new.errors) == 1:
        reason += "; one training seed, so this speaks of these two trained models only"
    return Comparison(
        new=new.name,
        base=base.name,
        new_rate=new.rate,
        base_rate=base.rate,
        difference=difference,
        lower=lower,
        upper=upper,
        interval=(float(np.expm1(low2)), float(np.expm1(high2))),
        margin=margin,
        level=level,
        verdict=verdict,
        smallest_detectable=float(np.expm1((high - low + strong - weak) / 2)),
        words=words,
        utterances=len(base.reference_words),
        seeds=len(new.errors),
        synthetic=synthetic,
        reason=reason,
    )


def _log_ratio(new: Floats | np.int64, base: Floats | np.int64) -> Floats:
    """An arm without errors counts as half an error, so that the logarithm is finite; half is less than any count."""
    ratio: Floats = np.log(np.maximum(new, 0.5)) - np.log(np.maximum(base, 0.5))
    return ratio


def _draws(new_GN: NDArray[np.int64], base_GN: NDArray[np.int64], samples: int, seed: int) -> Floats:
    """M draws of the log ratio; those of the exchanged arms are the same with the other sign."""
    half = (samples + 1) // 2
    forth_2M = _draws_one_way(new_GN, base_GN, half, np.random.default_rng(seed))
    back_2M = _draws_one_way(base_GN, new_GN, half, np.random.default_rng(seed))
    draws_2M = np.concatenate([forth_2M, -back_2M], axis=1)
    low_2, high_2 = np.quantile(draws_2M, [0.05, 0.95], axis=1)
    wider: Floats = draws_2M[np.argmax(high_2 - low_2)]
    return wider


def _draws_one_way(
    new_GN: NDArray[np.int64], base_GN: NDArray[np.int64], samples: int, rng: np.random.Generator
) -> Floats:
    """2 M: resampling the utterances alone, and the seeds around them."""
    sums_MC = resampled_sums(np.stack([new_GN.sum(0), base_GN.sum(0)], axis=1), samples, rng)
    centre = _log_ratio(new_GN.sum(), base_GN.sum())
    utterances_M = _log_ratio(sums_MC[:, 0], sums_MC[:, 1]) - centre
    G = len(new_GN)
    if G == 1:
        return centre + np.stack([utterances_M, utterances_M])
    z_GN = G * (new_GN / max(new_GN.sum(), 0.5) - base_GN / max(base_GN.sum(), 0.5))
    spread = z_GN.sum(axis=1).std(ddof=1)
    seeds_M = rng.standard_t(G - 1, size=samples) * spread / np.sqrt(G)
    nested_M = np.sqrt(1 - _shared(z_GN)) * utterances_M + seeds_M
    both_2M: Floats = centre + np.stack([utterances_M, nested_M])
    return both_2M


def _shared(z_GN: Floats) -> float:
    """c: the share of the utterance variance of L that the spread of the seeds contains as well.

    With z_gi the influence of utterance i on L of seed g and z_i its mean over the seeds, resampling utterances gives
    L the variance ``N var(z_i)``, of which ``sum_g N var(z_gi - z_i) / (G (G - 1))`` is each seed's own.
    """
    G = len(z_GN)
    mean_N = z_GN.mean(axis=0)
    whole = float(mean_N.var())
    own = float((z_GN - mean_N).var(axis=1).sum()) / (G * (G - 1))
    return min(own / whole, 1.0) if whole > 0 else 0.0


def _refusal(new: Arm, base: Arm, void_outside: tuple[float, float] | None) -> tuple[Verdict, str] | None:
    if not base.errors.any():
        return "void", f"{base.name} makes no error at all, so a relative difference to it does not exist"
    if void_outside is not None and not void_outside[0] <= base.rate <= void_outside[1]:
        low, high = void_outside
        end = "floor" if base.rate < low else "ceiling"
        return "void", (
            f"{base.name} is at a {end}: its error rate of {base.rate:.2%} is outside "
            f"{100 * low:g}% to {100 * high:g}%, "
            f"where {new.name} cannot be told from it"
        )
    return None


def _too_little(new: Arm, base: Arm, synthetic_words: int | None) -> tuple[Verdict, str] | None:
    if synthetic_words is not None and synthetic_words < SYNTHETIC_WORDS:
        return "undecided", f"{synthetic_words:,} words of synthetic speech, and the rule asks for {SYNTHETIC_WORDS:,}"
    errors = int(new.errors.sum() + base.errors.sum())
    if errors < FEWEST_ERRORS:
        return "undecided", f"{errors} errors in both arms together, and a bootstrap needs {FEWEST_ERRORS}"
    return None


def _decision(difference: float, lower: float, upper: float, margin: float) -> tuple[Verdict, str]:
    if upper < 0:
        return "better", f"the upper bound {upper:+.1%} is below zero"
    width = upper - difference
    if upper < margin and width <= margin:
        return "not inferior", f"the upper bound {upper:+.1%} clears the margin of {100 * margin:g}%"
    if lower > margin:
        return "inferior", f"the lower bound {lower:+.1%} is above the margin of {100 * margin:g}%"
    if width > margin:
        return "undecided", f"the bound is {width:.1%} above the estimate, wider than the margin of {100 * margin:g}%"
    return "undecided", f"the bounds {lower:+.1%} and {upper:+.1%} lie on both sides of the margin of {100 * margin:g}%"


def _seeds(count: int) -> str:
    return "1 training seed" if count == 1 else f"{count} training seeds"


def _whole(field: str, values: NDArray[np.int64], dimensions: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != dimensions or 0 in array.shape:
        form = "[seeds, utterances]" if dimensions == 2 else "[utterances]"
        raise DecodeError(f"{field} has shape {list(array.shape)}; it must be {form} with at least one of each")
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise DecodeError(f"{field}: {array.dtype}, smallest {array.min()}; counts are whole and not negative")
    return array.astype(np.int64)


def _check_alike(new: Arm, base: Arm) -> None:
    if not np.array_equal(new.reference_words, base.reference_words):
        raise DecodeError(
            f"{new.name} and {base.name} differ in reference_words; a paired comparison needs the same utterances in "
            "the same order, normalised in the same way; score both on one manifest"
        )
    if len(new.errors) != len(base.errors):
        raise DecodeError(
            f"{new.name} has {len(new.errors)} training seeds and {base.name} {len(base.errors)}; seeds are paired by "
            "row, so both need the same; train the missing ones (a model that is not trained may repeat its row)"
        )


def _check_settings(margin: float, level: float, samples: int) -> None:
    check_level(level)
    if level <= 0.5:
        raise DecodeError(f"level = {level}: a one-sided bound at or below 0.5 bounds nothing; use 0.95")
    if not margin > 0:
        raise DecodeError(f"margin = {margin}: the accepted relative difference must be above 0; use 0.05 for 5 %")
    if samples < 100:
        raise DecodeError(f"samples = {samples}: the bounds are quantiles of the draws; use at least 100, better 10000")
