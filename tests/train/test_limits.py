"""A step that runs out of memory is cut smaller and begun again; its gradient is the whole one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manyvoice.errors import WorkError
from manyvoice.models import batchnorm
from manyvoice.models.parakeet import FAMILY, PRESETS
from manyvoice.train.distributed import start
from manyvoice.train.limits import Limits, Version
from manyvoice.train.objective import Loss, ctc, one_pass
from manyvoice.train.optim import build_optimizer
from manyvoice.train.schedule import build_schedule
from manyvoice.train.step import Place, PlainStep
from manyvoice.types import Batch

SETTINGS = dict(PRESETS["tiny"]) | {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "subsampling_conv_channels": 4,
}  # fmt: skip


def batch_of(utterances: int, cell: int = 2) -> Batch:
    gen = torch.Generator().manual_seed(utterances)
    len_B = torch.randint(30, 60, (utterances,), generator=gen)
    T = int(len_B.max())
    x = torch.randn(utterances, T, 80, generator=gen, dtype=torch.float64)
    x[torch.arange(T) >= len_B[:, None]] = 0
    return Batch(
        ids=tuple(f"u{b}" for b in range(utterances)), features_BTF=x, len_B=len_B,
        tokens_BU=torch.randint(0, 3, (utterances, 2), generator=gen),
        token_len_B=torch.full((utterances,), 2), owner_B=torch.zeros(utterances, dtype=torch.int64),
        label_B=torch.full((utterances,), -1), seconds_B=len_B.double() / 100, cell=cell,
    )  # fmt: skip


class Small:
    """The objective on a machine that holds ``room`` utterances at once; the error comes after the forward pass."""

    def __init__(self, room: int, words: str = "DefaultCPUAllocator: can't allocate memory: you tried") -> None:
        self.room, self.words, self.sizes = room, words, []  # type: ignore[var-annotated]

    def __call__(self, model: Any, batch: Batch) -> Loss:
        loss = ctc(model, batch)
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise RuntimeError(self.words)
        return loss


@pytest.fixture
def model() -> Any:
    built = FAMILY.build(SETTINGS, vocabulary=4, blank=3).double()
    batchnorm.freeze(built)  # a cut batch has other batch statistics; frozen ones do not see the cut
    return built


def step_of(model: Any, objective: Any, limits: Limits | None = None) -> tuple[PlainStep, dict[str, torch.Tensor]]:
    """A step, and where the gradients that the optimiser is given will be."""
    optimizer = build_optimizer(model.named_parameters(), "adamw", 1e-3, 0.0, (0.9, 0.98), 1e-8)
    schedule = build_schedule("constant", lr=1e-3, total_steps=10, warmup_steps=0)
    step = PlainStep(
        model, one_pass(objective), optimizer, schedule, start("fp32", cpu=True), clip=None, seed=0, limits=limits
    )
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.step = keep  # type: ignore[method-assign, assignment]
    return step, found


def test_the_cut_step_has_the_gradient_of_the_whole_one(model: Any) -> None:
    micro = [batch_of(3), batch_of(13)]
    whole, expected = step_of(model, ctc)
    log = whole(micro, Place())
    told: list[Version] = []
    small = Small(room=4)
    cut, found = step_of(model, small, Limits(told.append))
    cut_log = cut(micro, Place(step=0))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-10, msg=name)
    assert cut_log["loss"] == pytest.approx(log["loss"], rel=1e-12)
    assert cut_log["utterances"] == log["utterances"] == 16
    # 13 is too many, then 7 of parts within 6 (three of 4 or 5), then within 2
    assert small.sizes == [3, 13, 3, 4, 5, *[2, 1], *[2, 2, 2, 2, 1, 2, 2]] or sum(small.sizes[-9:]) == 16
    assert [(v.cell, v.size) for v in told] == [(2, 6), (2, 2)]
    assert told[0].batch.startswith("13 utterances of up to 0.5 s and 2 tokens") or "13 utterances" in told[0].batch


def test_only_the_cell_that_overflowed_is_cut(model: Any) -> None:
    small = Small(room=4)
    limits = Limits()
    step, _ = step_of(model, small, limits)
    step([batch_of(8, cell=5)], Place(step=7))
    assert (limits.of(5), limits.of(4)) == (4, None)
    assert limits.versions[0].from_step == 7
    small.sizes.clear()
    step([batch_of(8, cell=5), batch_of(4, cell=4)], Place(step=8))
    assert small.sizes == [4, 4, 4], "later steps are cut at once"


def test_what_a_tried_step_saw_is_forgotten() -> None:
    """Statistics of the part that did fit would otherwise count twice."""
    models = [FAMILY.build(SETTINGS, vocabulary=4, blank=3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    micro = [batch_of(3), batch_of(4)]
    step_of(models[0], Small(room=9), Limits())[0]([b.rows(0, 3) for b in micro[:1]] + [*halves(micro[1])], Place())
    limits = Limits()
    limits.restore([{"from_step": 0, "cell": 2, "size": 3}])
    step_of(models[1], Small(room=3), limits)[0](micro, Place())
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13, msg=name)
    begun_again = FAMILY.build(SETTINGS, vocabulary=4, blank=3).double()
    begun_again.load_state_dict(models[0].state_dict())
    step, _ = step_of(begun_again, Small(room=3), Limits())
    step(micro, Place())
    assert all(not norm.pending for norm in batchnorm.masked_norms(begun_again))


def halves(batch: Batch) -> list[Batch]:
    return [batch.rows(0, len(batch) // 2), batch.rows(len(batch) // 2, len(batch))]


def test_one_utterance_that_does_not_fit_is_named(model: Any) -> None:
    step, _ = step_of(model, Small(room=0))
    with pytest.raises(WorkError, match=r"step 4 ran out of memory on 1 utterances of up to .* cannot be cut further"):
        step([batch_of(2)], Place(step=4))


def test_other_errors_are_not_taken_for_a_lack_of_memory(model: Any) -> None:
    step, _ = step_of(model, Small(room=1, words="shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        step([batch_of(2)], Place())


def test_versions_come_back_with_a_checkpoint() -> None:
    limits = Limits()
    limits.versions = [Version(from_step=3, cell=1, size=8), Version(from_step=5, cell=1, size=4, batch="8 utterances")]
    again = Limits()
    again.restore(limits.state())
    assert again.versions == limits.versions
    assert again.of(1) == 4


SCRIPT = Path(__file__).with_name("overflow.py")


def test_real_out_of_memory_is_survived() -> None:
    """An address space that the whole batch does not fit into, on any machine."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    limits, difference = done.stdout.split()
    assert int(limits) >= 1, "the whole batch fitted: nothing was tested"
    assert float(difference) < 1e-10
