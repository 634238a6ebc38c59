"""The batch-size search: what fits, found with few trials, and trials that leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.errors import UsageError
from manyvoice.models.parakeet import FAMILY, PRESETS
from manyvoice.train import accounting
from manyvoice.train.accounting import peak_bytes, resident, resident_peak
from manyvoice.train.distributed import start
from manyvoice.train.memory import (
    TOLERANCE,
    Shape,
    Trial,
    bracket,
    cuda_limit,
    fit_by_counting,
    fits_on_cuda,
    out_of_memory,
    search,
)  # fmt: skip
from manyvoice.train.objective import ctc, one_pass
from manyvoice.train.optim import build_optimizer

SETTINGS = dict(PRESETS["tiny"]) | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "subsampling_conv_channels": 8,
}  # fmt: skip


@given(room=st.integers(0, 5000), start=st.integers(1, 400), most=st.integers(1, 6000))
def test_the_bracket_closes_on_what_fits(room: int, start: int, most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        assert 1 <= size <= most
        tried.append(size)
        return size <= room

    found = bracket(fits, start, most)
    assert found <= min(room, most)
    assert len(set(tried)) == len(tried), "no size is tried twice"
    if room >= most:
        assert found == most
    elif room:
        above = min(t for t in tried if t > room)
        assert found == max(t for t in tried if t <= room)
        assert above - found <= max(1, TOLERANCE * above)
        # the trial before the last had not closed the bracket: none was superfluous
        before = [t for t in tried[:-1] if t <= room], [t for t in tried[:-1] if t > room]
        if all(before):
            assert min(before[1]) - max(before[0]) > max(1, TOLERANCE * min(before[1]))
    else:
        assert found == 0


SHAPES = [Shape(frames=f, tokens=t) for f, t in ((100, 5), (100, 9), (400, 20), (1600, 60))]


def test_the_search_starts_with_the_largest_and_stays_within_the_bins() -> None:
    order: list[Shape] = []

    def fits(shape: Shape, size: int) -> bool:
        order.append(shape)
        return size * shape.frames <= 40_000

    sizes = search(SHAPES, [1000, 7, 1000, 1000], fits)
    assert order[0] == SHAPES[3] and order[-1] == SHAPES[0]
    assert sizes[1] == 7, "a batch holds no more than its bin"
    for size, shape in zip(sizes, SHAPES, strict=True):
        if size != 7:
            assert 0.95 * 40_000 / shape.frames - 1 <= size <= 40_000 / shape.frames


def test_a_bin_whose_utterances_do_not_fit_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"one utterance of 1600 frames and 60 tokens does not fit into memory .*1 of 4"
    ):
        search(SHAPES, [9] * 4, lambda shape, size: shape.frames < 1600)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return FAMILY.build(SETTINGS, vocabulary=20, blank=19)


def trial_of(model: Any, name: str = "adamw", ranks: int = 1, objective: Any = ctc) -> Trial:
    def make() -> torch.optim.Optimizer:
        return build_optimizer(model.named_parameters(), name, 1e-3, 0.0, (0.9, 0.98), 1e-8)

    return Trial(model, one_pass(objective), make, start("fp32", cpu=True), bins=80, ranks=ranks)


@pytest.mark.parametrize("optimizer", ["adamw", "scaledadam"])
def test_a_trial_leaves_no_trace(model: Any, optimizer: str) -> None:
    model.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    trial = trial_of(model, optimizer, ranks=2)
    for size in (1, 3):
        trial.run(Shape(frames=90, tokens=4), size)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not model.training


def test_a_trial_that_fails_leaves_no_trace_either(model: Any) -> None:
    def objective(net: Any, batch: Any) -> Any:
        ctc(net, batch).total.backward()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trial_of(model, objective=objective).run(Shape(frames=90, tokens=4), 2)
    assert all(p.grad is None for p in model.parameters())


def test_labels_that_do_not_fit_the_frames_are_cut(model: Any) -> None:
    batch = trial_of(model).batch(Shape(frames=80, tokens=500), 2)
    assert int(batch.token_len_B[0]) == FAMILY.encoder_frames(model, 80)
    assert ctc(model, batch).counts["unaligned"] == 0


def test_bytes_are_counted_until_they_are_freed() -> None:
    def work() -> None:
        a = torch.zeros(1000, dtype=torch.float64)  # 8000
        b = a + 1  # 16000
        del a
        c = b.view(10, 100)[2:5] * 1.0  # 8000 + 2400
        b.add_(1.0)
        del b, c
        torch.zeros(100)

    assert peak_bytes(work) == 16_000


def test_what_the_backward_pass_holds_is_counted() -> None:
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    # e, e * e, its sum; then the slope of the product, twice, and that of the root's argument
    peak = peak_bytes(lambda: x.exp().square().sum().backward())
    assert 24_000 <= peak <= 40_100


def test_counting_predicts_any_size(model: Any) -> None:
    trial = trial_of(model)
    shape = Shape(frames=300, tokens=10)
    trial.run(shape, 1)
    one, two, five = (peak_bytes(lambda n=n: trial.run(shape, n)) for n in (1, 2, 5))  # type: ignore[misc]
    assert five == pytest.approx(two + 3 * (two - one), rel=0.01)


def test_sizes_fill_the_limit(model: Any) -> None:
    shapes = [Shape(frames=f, tokens=t) for f in (100, 200, 300, 500, 700, 900) for t in (4, 9)]
    limit = resident() + 200 * 2**20
    found = fit_by_counting(trial_of(model), shapes, [10_000] * len(shapes), limit)
    assert all(n >= 1 for n in found.sizes)
    for k, (shape, other) in enumerate(zip(shapes, shapes[1:], strict=False)):
        if shape.frames <= other.frames and shape.tokens <= other.tokens:
            assert found.sizes[k] >= found.sizes[k + 1]
    assert all(0.8 * limit < b <= limit * 1.01 for b in found.bytes_of)
    capped = fit_by_counting(trial_of(model), shapes[:2], [3, 2], limit)
    assert capped.sizes == [3, 2]


def test_a_limit_below_one_utterance_is_refused(model: Any) -> None:
    shapes = [Shape(frames=100, tokens=4), Shape(frames=3000, tokens=40)]
    with pytest.raises(UsageError, match=r"batch\.memory: one utterance of .* does not fit into .* GiB"):
        fit_by_counting(trial_of(model), shapes, [4, 4], resident() + 2**20)


def test_the_most_a_process_held_is_measured() -> None:
    if (peak := resident_peak(lambda: torch.ones(60 * 2**20, dtype=torch.uint8).sum())) is None:
        pytest.skip("this system does not tell how much a process held at most")
    assert peak - resident() > 40 * 2**20


def test_leftovers_go_back_once_they_are_a_twentieth_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    held, given = [500], []

    def release() -> None:
        given.append(held[0])
        held[0] = 400

    monkeypatch.setattr(accounting, "resident", lambda: held[0])
    monkeypatch.setattr(accounting, "release", release)
    tidy = accounting.Leftovers(1000)
    for now in (500, 450, 451, 420, 600):
        held[0] = now
        tidy()
    assert given == [500, 451, 600]


def test_real_out_of_memory_on_a_gpu(gpu: torch.device, model: Any) -> None:
    model.to(gpu)
    trial = trial_of(model)
    trial.accelerator = start("fp32")
    with cuda_limit(0.05):
        fits: Callable[[Shape, int], bool] = fits_on_cuda(trial)
        size = search([Shape(frames=1000, tokens=20)], [100_000], fits)[0]
        assert fits(Shape(frames=1000, tokens=20), size)
        assert not fits(Shape(frames=1000, tokens=20), round(size * 1.1))
