"""How many utterances of a shape fit into memory: real training steps, and the search over their size.

On an accelerator steps run until one fails; on a CPU two are counted and the rest follows. OOMptimizer of NeMo
(arXiv:2503.05931) is the model for the first; the second is ours.

    B  utterances   T  feature frames   U  label tokens
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from manyvoice.errors import UsageError
from manyvoice.models.anatomy import family_of
from manyvoice.models.batchnorm import discard
from manyvoice.train.accounting import peak_bytes, release, resident, resident_peak
from manyvoice.train.distributed import CHUNK_BYTES
from manyvoice.train.objective import Passes
from manyvoice.train.sandwich import SupernetPasses
from manyvoice.types import Batch, Frames

# As in NeMo's OOMptimizer: the bracket's width, and where the first search starts.
TOLERANCE, START = 0.05, 32
# A step to confirm what was counted should not keep anybody waiting.
_CONFIRM_SECONDS = 8.0
# Shapes whose bytes are counted before a polynomial may stand for the others.
_ENOUGH_SHAPES, _FIT_WITHIN = 9, 0.02
# Counted batches take so many times what a step of next to nothing takes, or are as large as this.
_ABOVE, _MOST_COUNTED = 3.0, 64
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "cufft_internal_error")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The worst utterance of a bin: feature frames and label tokens."""

    frames: int
    tokens: int

    def text(self) -> str:
        """In words."""
        return f"{self.frames} frames and {self.tokens} tokens"


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on any device; libraries on CUDA report that in words of their own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


@final
class Trial:
    """One real training step at a time that leaves no trace: nothing is learned from noise.

    Args: passes, make_optimizer: as in training.  ranks: with several, the buffer of their exchange is held too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        make_optimizer: Callable[[], Optimizer],
        accelerator: Accelerator,
        *,
        bins: int,
        ranks: int = 1,
    ) -> None:
        self.model, self.passes, self.accelerator, self.bins, self.ranks = model, passes, accelerator, bins, ranks
        self.optimizer = make_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, shape: Shape, size: int) -> None:
        """Forward, backward and update on ``size`` utterances, all of full length. Raises what training would."""
        with self._untouched():
            batch = self.batch(shape, size).to(self.accelerator.device, self.model.dtype)
            # where steps differ, the largest says what fits
            step = self.passes.heaviest() if isinstance(self.passes, SupernetPasses) else 0
            with closing(self.passes(self.model, batch, step)) as losses, self.accelerator.autocast():
                for loss in losses:
                    loss.total.backward()
            exchanged = self._exchange_buffer()
            self.optimizer.step()
            del exchanged

    def batch(self, shape: Shape, size: int) -> Batch:
        """Noise of that shape, its labels without repeats: as many as the encoder's frames can hold."""
        gen = torch.Generator().manual_seed(size)
        family = family_of(self.model)
        room = family.encoder_frames(self.model, Frames(shape.frames))
        U = max(1, min(shape.tokens, room))
        labels_U = (torch.arange(U) % 2 + 1) % max(2, family.blank(self.model))
        x_BTF = torch.randn(size, shape.frames, self.bins, generator=gen)
        column = torch.zeros(size, dtype=torch.int64)
        return Batch(
            ids=("noise",) * size, features_BTF=x_BTF, len_B=column + shape.frames, tokens_BU=labels_U.repeat(size, 1),
            token_len_B=column + U, owner_B=column, label_B=column - 1, seconds_B=column.double(),
        )  # fmt: skip

    def _exchange_buffer(self) -> Tensor | None:
        """What the exchange of gradients holds besides them."""
        if self.ranks == 1:
            return None
        held = sum(p.grad.numel() * p.grad.element_size() for p in self.model.parameters() if p.grad is not None)
        return torch.empty(min(held, CHUNK_BYTES), dtype=torch.uint8, device=self.accelerator.device)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        was_training = self.model.training
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            try:
                yield
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                discard(self.model)
                self.model.train(was_training)
                with torch.no_grad():
                    for name, b in self.model.named_buffers():
                        b.copy_(buffers[name])


def bracket(fits: Callable[[int], bool], start: int, most: int, *, tolerance: float = TOLERANCE) -> int:
    """The largest size known to fit, once the smallest known not to is within ``tolerance`` of it or one above it.

    Doubles or halves from ``start``, then bisects; no size is tried twice. Zero if not even one fits.
    """
    good, bad = 0, most + 1
    size = max(1, min(start, most))
    while bad - good > 1 and (bad > most or good == 0 or (bad - good) / bad > tolerance):
        if fits(size):
            good = size
            size = min(2 * size, most) if bad > most else (good + bad) // 2
        else:
            bad = size
            size = max(1, size // 2) if good == 0 else (good + bad) // 2
    return good


def search(shapes: Sequence[Shape], counts: Sequence[int], fits: Callable[[Shape, int], bool]) -> list[int]:
    """Sizes of all shapes by trial, the largest first; each starts from the one before, scaled by its frames.

    Args: counts: utterances of each bin; there is no use in a batch larger than that.
    Raises: UsageError if one utterance of a shape does not fit.
    """
    sizes = [0] * len(shapes)
    last: tuple[Shape, int] | None = None
    for k in sorted(range(len(shapes)), key=lambda k: (shapes[k].frames, shapes[k].tokens), reverse=True):
        shape = shapes[k]
        start = START if last is None else round(last[1] * last[0].frames / shape.frames)
        sizes[k] = bracket(partial(fits, shape), start, max(1, counts[k]))
        if sizes[k] == 0:
            raise _nothing_fits(shape, shapes)
        # a bin with few utterances says little about how many of the next would fit
        last = (shape, sizes[k]) if last is None or sizes[k] < counts[k] else last
    return sizes


def fits_on_cuda(trial: Trial) -> Callable[[Shape, int], bool]:
    """Whether a real step runs; use within :func:`cuda_limit`. What is cached is kept from one trial to the next."""

    def fits(shape: Shape, size: int) -> bool:
        try:
            trial.run(shape, size)
            torch.cuda.synchronize()
            return True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        gc.collect()  # the error's frames held the step's tensors
        return False

    return fits


@contextmanager
def cuda_limit(fraction: float) -> Iterator[None]:
    """At most this share of the device for this process; afterwards all of it."""
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@final
@dataclass(frozen=True, kw_only=True)
class Counted:
    """Sizes found by counting.

    Args: bytes_of: predicted of the process, per shape.  confirmed: measured over predicted bytes of real steps, the
        largest; None where it could not be measured.
    """

    sizes: list[int]
    bytes_of: list[int]
    confirmed: float | None


def fit_by_counting(trial: Trial, shapes: Sequence[Shape], counts: Sequence[int], limit: int) -> Counted:
    """The most utterances B of each shape with resident + a + b B <= limit bytes; a and b from counts of small batches.

    Where there are many shapes, some are counted and a and b of all are fitted by c1 T + c2 E + c3 E^2 + c4 E U, with
    E the encoder's frames; if that misses any that was counted, or two that were kept apart, by more than 2 %, all are
    counted. Real steps of the shortest, a middle and the longest shape then say how many times the counted bytes a step
    takes, since a general allocator keeps freed blocks that fit nothing else; the largest of the three goes for all,
    because what one batch has left behind is there when the next one runs.

    Raises: UsageError if one utterance of a shape does not fit.
    """
    smallest = min(shapes, key=lambda s: s.frames)
    trial.run(smallest, 1)  # the optimiser's state is there from now on
    release()
    base = resident()
    ab_S2 = _bytes_per_shape(trial, shapes)
    sizes = _most(shapes, counts, ab_S2, limit - base, limit)
    confirmed = _confirm(trial, shapes, sizes, ab_S2, base)
    factor = max(1.0, confirmed or 1.0)
    if factor > 1.0:
        sizes = _most(shapes, counts, ab_S2, (limit - base) / factor, limit)
    bytes_of = [round(base + factor * (a + b * n)) for n, (a, b) in zip(sizes, ab_S2, strict=True)]
    return Counted(sizes=sizes, bytes_of=bytes_of, confirmed=confirmed)


def _most(shapes: Sequence[Shape], counts: Sequence[int], ab_S2: np.ndarray, room: float, limit: int) -> list[int]:
    """The most utterances of each shape in ``room`` bytes."""
    sizes = [min(max(1, n), int((room - a) // b)) for n, (a, b) in zip(counts, ab_S2, strict=True)]
    for shape, size in zip(shapes, sizes, strict=True):
        if size < 1:
            raise _nothing_fits(shape, shapes, limit)
    return sizes


def _bytes_per_shape(trial: Trial, shapes: Sequence[Shape]) -> np.ndarray:
    """a and b of every shape, S 2."""

    # while a batch is small its peak is the optimiser's, which knows nothing of the batch
    floor = peak_bytes(lambda: trial.run(min(shapes, key=lambda s: s.frames), 1))

    def count(shape: Shape) -> tuple[float, float]:
        def peak(n: int) -> int:
            return peak_bytes(lambda: trial.run(shape, n))

        size, one = 1, peak(1)
        while one < _ABOVE * floor and size < _MOST_COUNTED:
            size *= 2
            one = peak(size)
        each = (peak(2 * size) - one) / size
        return one - size * each, each

    if len(shapes) <= _ENOUGH_SHAPES:
        return np.asarray([count(s) for s in shapes])
    family = family_of(trial.model)
    T, U = (np.asarray([getattr(s, name) for s in shapes], dtype=float) for name in ("frames", "tokens"))
    E = np.asarray([family.encoder_frames(trial.model, Frames(s.frames)) for s in shapes], dtype=float)
    chosen = _spread(T, U)
    counted = np.asarray([count(shapes[k]) for k in chosen])
    features = np.stack([T, E, E**2, E * U], axis=1)
    features /= features.max(0)
    known = chosen[:-2]
    weight = 1.0 / counted[:-2, 1:]  # relative errors count
    ab_S2: np.ndarray = features @ np.linalg.lstsq(features[known] * weight, counted[:-2] * weight, rcond=None)[0]
    total, expected = ab_S2[chosen].sum(1), counted.sum(1)
    if np.abs(total / expected - 1).max() > _FIT_WITHIN:
        return np.asarray([count(s) for s in shapes])
    return ab_S2


def _spread(T: np.ndarray, U: np.ndarray) -> list[int]:
    """Shapes at the ends and between, in both directions; the last two are for checking."""
    order = np.lexsort((U, T))
    picks = [order[round(f * (len(order) - 1))] for f in (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 0.4, 0.92)]
    rates = U / T
    ends = [int(np.argmin(rates)), int(np.argmax(rates))]
    return [*dict.fromkeys([*map(int, picks[:-2]), *ends]), *map(int, picks[-2:])]


def _confirm(trial: Trial, shapes: Sequence[Shape], sizes: Sequence[int], ab_S2: np.ndarray, base: int) -> float | None:
    """Measured over predicted bytes of the shortest, a middle and the longest shape: the largest of them."""
    order = np.argsort([s.frames for s in shapes], kind="stable")
    ratios = []
    for k in dict.fromkeys((order[-1], order[len(order) // 2], order[0])):
        started = time.perf_counter()
        trial.run(shapes[k], 1)
        each = time.perf_counter() - started
        size = max(1, min(sizes[k], int(_CONFIRM_SECONDS / each)))
        release()
        measured = resident_peak(partial(trial.run, shapes[k], size))
        if measured is None:
            return None
        a, b = ab_S2[k]
        ratios.append((measured - base) / (a + b * size))
    return float(max(ratios))


def _nothing_fits(shape: Shape, shapes: Sequence[Shape], limit: int | None = None) -> UsageError:
    room = "memory" if limit is None else f"{limit / 2**30:.2f} GiB"
    longer = sum(s.frames >= shape.frames for s in shapes)
    return UsageError(
        f"batch.memory: one utterance of {shape.text()} does not fit into {room} in training ({longer} of "
        f"{len(shapes)} bins are as long); give more memory, leave longer utterances out, set "
        "train.activation_checkpointing=true, or take a smaller model"
    )
