"""A subnet as a model of its own: the narrowed model's weights, and nothing else."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.elastic.narrow import Elastic, Statistics
from manyvoice.elastic.subnet import Subnet


@torch.no_grad()
def extract(elastic: Elastic, subnet: Subnet, *, statistics: Statistics | None = None) -> PreTrainedModel:
    """A stand-alone model that computes what the narrowed one does, bit for bit; in evaluation mode.

    Args: statistics: of the subnet's norms, where they are its own.
    Raises: ModelError if the subnet does not fit, or the family's folders hold no other shape than the whole.
    """
    tensors = tensors_of(elastic, subnet, statistics=statistics)
    model = elastic.family.shaped(elastic.model, tensors)
    elastic.family.prepare_training(model)
    model.eval()
    return model


def tensors_of(elastic: Elastic, subnet: Subnet, *, statistics: Statistics | None = None) -> dict[str, Tensor]:
    """The subnet's parameters and buffers under the names they have in a model of their own: layers counted anew."""
    plan = elastic.plan(subnet)
    place = {original: new for new, original in enumerate(plan.layers)}
    layer_of = re.compile(rf"({re.escape(elastic.anatomy.layers)}\.)(\d+)(\..+)")
    found = {}
    for name, x in (elastic.model.state_dict() | dict(statistics or {})).items():
        match = layer_of.fullmatch(name)
        if match and int(match[2]) not in place:
            continue
        if any(name.startswith(f"{path}.") for path in plan.dropped):
            continue
        for one in plan.slices.get(name, ()):
            x = one.of(x)
        own = f"{match[1]}{place[int(match[2])]}{match[3]}" if match else name
        found[own] = x.detach().clone().contiguous()
    return found
