"""The front end runs once for all subnets of a micro-batch, and is back-propagated once, after the last of them.

No subnet changes it, so running it again for each would give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.models.anatomy import Anatomy


@final
class Once:
    """What the front end said the first time; every later call gets it again, cut off from what is behind it.

    With y = f(x) and losses L_1 .. L_n of y, each back-propagated as far as y only, the gradient of
    <y, dL_1/dy + .. + dL_n/dy>, the sums held fast, is that of L_1 + .. + L_n behind y.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward
        self._y: Tensor | None = None
        self._cut: Tensor | None = None

    def __call__(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        if self._cut is None:
            self._y = self._forward(*inputs, **more)
            self._cut = self._y.detach().requires_grad_(self._y.requires_grad)
        return self._cut

    def rest(self) -> Tensor | None:
        """A scalar whose gradient is what the losses so far owe to the front end; None if they owe nothing."""
        if self._y is None or self._cut is None or self._cut.grad is None:
            return None
        return (self._y * self._cut.grad).sum()


@contextmanager
def front_once(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Once | None]:
    """Inside, which is one micro-batch, the front end runs at most once; None where a family names no module for it."""
    if not anatomy.front_module:
        yield None
        return
    module = model.get_submodule(anatomy.front_module)
    before = module.__dict__.get("forward")  # others may have put theirs there
    once = Once(module.forward)
    module.__dict__["forward"] = once
    try:
        yield once
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
