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
    recogniser = Recogniser.load(spec)
    there = all_sizes(recogniser)
    if keep and budget.name in {s.subnet.name for s in there}:
        raise UsageError(f"{recogniser.folder} has a size {budget.name} already; choose another budget")
    own = any(s.statistics is not None for s in there)
    elastic = Elastic(recogniser.model)
    grid = Grid(recogniser.model, recogniser.family)
    measure = measure_of(grid, recogniser, budget.of)
    scored: dict[frozenset[str], tuple[Size, dict[str, Any]]] = {}

    def score(subnet: Subnet) -> float:
        statistics = elastic.statistics() if own and subnet.kept != everything else None
        if statistics is not None:
            with elastic.at(subnet, statistics=statistics):
                batchnorm.recalibrate(recogniser.model, _forwards(recogniser, corpus))
        size = Size(subnet=subnet, statistics=statistics, document={})
        found = evaluate(alone(recogniser, elastic, size), corpus).as_dict()
        scored[subnet.kept] = size, found
        watcher.progress("sizes tried", len(scored), tries + 1)
        return float(found["wer"])

    everything = whole(elastic.anatomy).kept
    time_of: dict[frozenset[str], float] = {}

    def taken(subnet: Subnet) -> float:
        """Measured where it is time, which the rule to choose by only estimates."""
        if budget.of != "latency":
            return measure(subnet)
        if subnet.kept not in time_of:
            time_of[subnet.kept] = milliseconds(recogniser, elastic, subnet)
        return time_of[subnet.kept]

    sizes = [size.subnet for size in there]
    limit = budget.limit
    uniform = nested_sizes(grid, [limit], measure, beside=sizes)[0]
    while taken(uniform) > budget.limit:
        limit *= min(0.99, budget.limit / taken(uniform))
        uniform = nested_sizes(grid, [limit], measure, beside=sizes)[0]
    score(uniform)
    chosen, tried = [("uniform", uniform)], 0
    if tries:
        try:
            at_random = random_search(grid, budget.limit, score, tries=tries, measure=measure)
        except UsageError as error:
            watcher.note(str(error))
            at_random = []
        tried = len(at_random)
        chosen += [("random search", f.subnet) for f in at_random if taken(f.subnet) <= budget.limit][:1]
    named = next((size for size in there if taken(size.subnet) <= budget.limit), None)
    if named is not None and named.subnet.kept != uniform.kept:
        # as the model has it, with its own statistics
        scored[named.subnet.kept] = named, evaluate(alone(recogniser, elastic, named), corpus).as_dict()
        chosen.append((f"size {named.subnet.name}", named.subnet))
    rows = []
    for how, subnet in chosen:
        size, found = scored[subnet.kept]
        if test is not None:
            found = evaluate(alone(recogniser, elastic, size), test).as_dict()
        costs = cost_of(recogniser.model, recogniser.family, subnet.kept)
        rows.append(
            {"how": how, "taken": taken(subnet), "share": grid.share(subnet), "parameters": costs.parameters,
             "wer": found["wer"], "wer_interval": found.get("wer_interval"),
             "tried": tried if how == "random search" else 1}
        )  # fmt: skip
    if keep:
        best = min(chosen, key=lambda c: float(scored[c[1].kept][1]["wer"]))[1]
        same = next((s.subnet.name for s in there if s.subnet.kept == best.kept), None)
        if same is not None:
            watcher.note(f"nothing kept: size {same}, which the model has, is within the budget and none is better")
        else:
            size = replace(scored[best.kept][0], subnet=replace(best, name=budget.name))
            _keep(recogniser, elastic, size, budget, taken(best), corpus, watcher)
            if not is_nested(best, sizes):
                watcher.note("it neither contains nor is contained in every other size of the model")
    return rows


def _keep(
    recogniser: Recogniser, elastic: Elastic, size: Size, budget: Budget, taken: float, corpus: Corpus,
    watcher: Watcher,
) -> None:  # fmt: skip
    """Put a size among the model's."""
    results = measured(alone(recogniser, elastic, size), {"dev": corpus}, watcher, f"size {budget.name} on")
    costs = cost_of(recogniser.model, recogniser.family, size.subnet.kept)
    asked = asdict(budget) | {"taken": taken, "machine": machine()["processor"]}
    write_size(recogniser, size, {"costs": asdict(costs), "results": results, "budget": asked})
    watcher.note(f"kept as size {budget.name}")


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
