"""More sizes of a trained supernet, for budgets that nobody thought of before: by rule, and by random search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from manyvoice.data.collate import Collator, LiveFeatures
from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import batches_by_length, evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.speed import machine
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.search import random_search
from manyvoice.elastic.sizes import Grid, Measure, Shape, is_nested, nested_sizes
from manyvoice.elastic.subnet import Subnet, whole
from manyvoice.errors import UsageError
from manyvoice.models import batchnorm
from manyvoice.models.cost import cost_of
from manyvoice.recipes.card import measured
from manyvoice.recipes.sizes import Size, all_sizes, alone, speed_of, write_size
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.types import Seconds

Kind = Literal["macs", "parameters", "latency"]
KINDS: tuple[Kind, ...] = ("macs", "parameters", "latency")
_BATCH = Seconds(60.0)


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a size may take. Args: of: share of the layers' MACs, parameters, or ms for 10 s of audio on one thread."""

    limit: float
    of: Kind

    @property
    def name(self) -> str:
        """What a size for it is called."""
        return {
            "macs": f"{100 * self.limit:g}",
            "parameters": f"{self.limit / 1e6:g}M",
            "latency": f"{self.limit:g}ms",
        }[self.of]


def find_sizes(
    spec: str | Path,
    corpus: Corpus,
    budget: Budget,
    *,
    tries: int = 0,
    keep: bool = False,
    test: Corpus | None = None,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:
    """Rows of a budget: the balanced uniform subnet, the best of ``tries`` drawn at random, and the model's own size.

    The uniform one is nested among the model's sizes where one is that leaves at most a tenth of the budget unused;
    those at random need not be. What a budget of time gives was measured to keep it.

    Statistics are measured on the corpus's sound where the supernet's sizes have their own, and error rates on its
    texts.

    Args: keep: put the best row's subnet among the model's sizes.  test: what error rates are reported on; the best of
        many looks better than it is on the corpus that chose it.
    Raises: UsageError for a budget below the smallest subnet, or a name that the model has already.
    """
    if budget.of == "macs" and budget.limit > 1:
        raise UsageError(f"--budget {budget.limit:g}: of MACs it is a share, such as 0.5; or say --of latency")
    watcher = watcher or Silent()
    finding = _Finding(Recogniser.load(spec), corpus, budget, tries, watcher)
    if keep and budget.name in {s.subnet.name for s in finding.there}:
        raise UsageError(f"{finding.recogniser.folder} has a size {budget.name} already; choose another budget")
    chosen = finding.chosen()
    rows = [finding.row(how, subnet, test) for how, subnet in chosen]
    if keep:
        finding.keep(min((subnet for _, subnet in chosen), key=finding.rate))
    return rows


@final
class _Finding:
    """One budget on one model."""

    def __init__(self, recogniser: Recogniser, corpus: Corpus, budget: Budget, tries: int, watcher: Watcher) -> None:
        self.recogniser, self.corpus, self.budget, self.tries = recogniser, corpus, budget, tries
        self.watcher, self.there = watcher, all_sizes(recogniser)
        self.elastic, self.grid = Elastic(recogniser.model), Grid(recogniser.model, recogniser.family)
        self.measure = measure_of(self.grid, recogniser, budget.of)
        self._tried = 0
        self._time_of: dict[frozenset[str], float] = {}
        self._scored: dict[frozenset[str], tuple[Size, dict[str, Any]]] = {}

    def chosen(self) -> list[tuple[str, Subnet]]:
        """What there is to compare, scored."""
        uniform = self._uniform()
        self._score(uniform)
        found = [("uniform", uniform)]
        if self.tries:
            at_random = self._at_random()
            self._tried = len(at_random)
            found += [("random search", s) for s in at_random if self._taken(s) <= self.budget.limit][:1]
        named = next((size for size in self.there if self._taken(size.subnet) <= self.budget.limit), None)
        if named is not None and named.subnet.kept != uniform.kept:
            # as the model has it, with its own statistics
            found_here = evaluate(alone(self.recogniser, self.elastic, named), self.corpus).as_dict()
            self._scored[named.subnet.kept] = named, found_here
            found.append((f"size {named.subnet.name}", named.subnet))
        return found

    def rate(self, subnet: Subnet) -> float:
        """Word error rate of one that was scored."""
        return float(self._scored[subnet.kept][1]["wer"])

    def row(self, how: str, subnet: Subnet, test: Corpus | None) -> dict[str, Any]:
        """What one takes, and its error rate."""
        size, found = self._scored[subnet.kept]
        if test is not None:
            found = evaluate(alone(self.recogniser, self.elastic, size), test).as_dict()
        costs = cost_of(self.recogniser.model, self.recogniser.family, subnet.kept)
        return {
            "how": how, "taken": self._taken(subnet), "share": self.grid.share(subnet), "parameters": costs.parameters,
            "wer": found["wer"], "wer_interval": found.get("wer_interval"),
            "tried": self._tried if how == "random search" else 1,
        }  # fmt: skip

    def keep(self, best: Subnet) -> None:
        """Put one among the model's sizes."""
        same = next((s.subnet.name for s in self.there if s.subnet.kept == best.kept), None)
        if same is not None:
            self.watcher.note(
                f"nothing kept: size {same}, which the model has, is within the budget and none is better"
            )
            return
        name = self.budget.name
        size = replace(self._scored[best.kept][0], subnet=replace(best, name=name))
        small = alone(self.recogniser, self.elastic, size)
        results = measured(small, {"dev": self.corpus}, self.watcher, f"size {name} on")
        costs = cost_of(self.recogniser.model, self.recogniser.family, best.kept)
        asked = asdict(self.budget) | {"taken": self._taken(best), "machine": machine()["processor"]}
        write_size(self.recogniser, size, {"costs": asdict(costs), "results": results, "budget": asked})
        self.watcher.note(f"kept as size {name}")
        if not is_nested(best, [size.subnet for size in self.there]):
            self.watcher.note("it neither contains nor is contained in every other size of the model")

    def _uniform(self) -> Subnet:
        """The balanced one; where the budget is time, made smaller until it was measured to keep it."""
        sizes, limit = [size.subnet for size in self.there], self.budget.limit
        while True:
            (found,) = nested_sizes(self.grid, [limit], self.measure, beside=sizes)
            if (taken := self._taken(found)) <= self.budget.limit:
                return found
            limit *= min(0.99, self.budget.limit / taken)

    def _at_random(self) -> list[Subnet]:
        """Scored, the best first; none where none comes near the budget."""
        try:
            found = random_search(self.grid, self.budget.limit, self._score, tries=self.tries, measure=self.measure)
        except UsageError as error:
            self.watcher.note(str(error))
            return []
        return [one.subnet for one in found]

    def _taken(self, subnet: Subnet) -> float:
        """Of the budget; measured where it is time, which the rule to choose by only estimates."""
        if self.budget.of != "latency":
            return self.measure(subnet)
        if subnet.kept not in self._time_of:
            self._time_of[subnet.kept] = milliseconds(self.recogniser, self.elastic, subnet)
        return self._time_of[subnet.kept]

    def _score(self, subnet: Subnet) -> float:
        """Its word error rate, with statistics of its own where the supernet's sizes have theirs."""
        own = any(size.statistics is not None for size in self.there)
        whole_model = subnet.kept == whole(self.elastic.anatomy).kept
        statistics = self.elastic.statistics() if own and not whole_model else None
        if statistics is not None:
            with self.elastic.at(subnet, statistics=statistics):
                batchnorm.recalibrate(self.recogniser.model, _forwards(self.recogniser, self.corpus))
        size = Size(subnet=subnet, statistics=statistics, document={})
        found = evaluate(alone(self.recogniser, self.elastic, size), self.corpus).as_dict()
        self._scored[subnet.kept] = size, found
        self.watcher.progress("sizes tried", len(self._scored), self.tries + 1)
        return float(found["wer"])


def measure_of(grid: Grid, recogniser: Recogniser, kind: Kind) -> Measure:
    """What a budget counts."""
    if kind == "macs":
        return grid.share
    if kind == "parameters":
        return lambda subnet: float(grid.costs(subnet).parameters)
    return latency(grid, recogniser)


def latency(grid: Grid, recogniser: Recogniser) -> Measure:
    """Milliseconds for 10 s of audio on one thread of this machine: c0 + c1 layers + c2 chunks + c3 heads.

    The four, none below zero, are fitted to measured times of uniform subnets, the smallest and the largest among them;
    measuring every candidate would take minutes. What is chosen is then measured itself.
    """
    elastic, top = Elastic(recogniser.model), grid.largest
    corners = [
        (d, c, h) for d in (1, max(1, top.layers // 2), top.layers) for c in (1, top.chunks) for h in (1, top.heads)
    ]
    times, features = [], []
    for layers, chunks, heads in dict.fromkeys(corners):
        subnet = grid.subnet(Shape(layers, chunks, heads), "timed")
        times.append(milliseconds(recogniser, elastic, subnet))
        features.append(_counts(grid, subnet))
    weights = _not_negative(np.asarray(features), np.asarray(times))
    return lambda subnet: float(np.asarray(_counts(grid, subnet)) @ weights)


def milliseconds(recogniser: Recogniser, elastic: Elastic, subnet: Subnet) -> float:
    """Measured, for 10 s of audio on one thread."""
    model = extract(elastic, subnet)
    return 1000 * speed_of(Recogniser(model, recogniser.family, recogniser.tokenizer, recogniser.log_mel)).median


def _not_negative(x_NC: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Least squares of the relative error; a coefficient below zero is left out and the others are fitted again."""
    left = list(range(x_NC.shape[1]))
    found = np.zeros(x_NC.shape[1])
    while left:
        fitted = np.linalg.lstsq(x_NC[:, left] / y_N[:, None], np.ones(len(y_N)), rcond=None)[0]
        if fitted.min() >= 0:
            found[left] = fitted
            return found
        left.pop(int(fitted.argmin()))
    return found


def _counts(grid: Grid, subnet: Subnet) -> list[float]:
    """1, layers, and chunks and heads of all layers together."""
    kinds = [c.kind for c in grid.anatomy.components if c.name in subnet.kept]
    return [1.0, *(float(kinds.count(k)) for k in ("layer", "ff_chunk", "head"))]


def _forwards(recogniser: Recogniser, corpus: Corpus) -> Iterator[Callable[[], object]]:
    """Passes over the corpus's sound, texts unread."""
    collator = Collator(corpus, LiveFeatures(corpus, recogniser.log_mel), [[] for _ in range(len(corpus))])
    order = np.random.default_rng(0).permutation(len(corpus))
    parts = [order[i] for i in batches_by_length(corpus.durations_N[order], _BATCH)]
    few = batchnorm.RECALIBRATION_BATCHES
    for indices in parts[:: max(1, len(parts) // few)][:few]:
        batch = collator(indices)
        yield partial(recogniser.family.encode, recogniser.model, batch.features_BTF, batch.len_B)
