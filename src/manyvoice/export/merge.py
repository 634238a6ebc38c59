"""A voice worked into the weights: an ordinary model, which anything that runs the base runs as it is.

O  output width   I  input width
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import VoiceError
from manyvoice.models.anatomy import Site
from manyvoice.submodels.voice import Voice


@torch.no_grad()
def merge(recogniser: Recogniser, voice: Voice) -> Recogniser:
    """The recogniser with one voice for good, equal to the live voice up to rounding; the given one stays as it is.

    Sums are made in double precision and rounded once to the model's.
    Raises: VoiceError for a voice of another base, one whose method is no linear map, such as ``adapter``, and a shift
        where the model has no bias to hold it.
    """
    anatomy = recogniser.family.anatomy(recogniser.model)
    voice.check(anatomy, base=recogniser.fingerprint(), tokenizer=recogniser.tokenizer.fingerprint())
    model = copy.deepcopy(recogniser.model)
    for site in voice.method.sites(anatomy):
        _work_in(model.get_submodule(site.name), site, voice)
    return Recogniser(model, recogniser.family, recogniser.tokenizer, recogniser.log_mel)


def _work_in(module: nn.Module, site: Site, voice: Voice) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    wide = None if bias is None else bias.double()
    made = None
    if site.kind == "linear" and isinstance(weight, Tensor):
        made = voice.method.merged(_tensors_at(site, voice), weight.double(), wide)
    if made is None or not isinstance(weight, Tensor):
        raise VoiceError(
            f"voice {voice.hash[:12]}: method {voice.method.name} cannot be worked into the weights, because what "
            f"it does at {site.key} is no linear map; keep it apart: --to onnx --voice, or serve the base with it"
        )
    new_weight, new_bias = made
    weight.copy_(new_weight)
    if bias is not None:
        bias.copy_(new_bias)
    elif new_bias is not None and new_bias.any():
        raise VoiceError(
            f"voice {voice.hash[:12]} shifts {site.key}, but that map ({site.name}) has no bias to hold the shift; "
            "keep it apart: --to onnx --voice, or train a lora voice"
        )


def _tensors_at(site: Site, voice: Voice) -> Mapping[str, Tensor]:
    own = {name: t for (key, name), t in voice.tensors.items() if key in ("", site.key)}
    return {name: own[name].double() for name in voice.method.parts(site)}
