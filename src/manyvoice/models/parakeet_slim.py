"""Parakeet-CTC in any size: a stock model where its configuration can say the shape, else one of ours.

Stock configurations know one width for all layers. Where a subnet keeps more heads in one layer than in another, or
drops a convolution module, the folder is of the type below, which Transformers' Auto classes load once manyvoice is
imported; no code travels with the folder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, ParakeetCTCConfig, ParakeetForCTC, PreTrainedModel

from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Absent

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


class LayerSizes(TypedDict):
    """Units of one layer: hidden units of both feed-forward layers, heads, and whether it has a convolution."""

    ff1: int
    ff2: int
    heads: int
    conv: bool


class ParakeetSlimConfig(ParakeetCTCConfig):
    """``ParakeetCTCConfig`` with ``layer_sizes``, a :class:`LayerSizes` for each layer."""

    model_type = "manyvoice_parakeet_ctc"


class ParakeetSlimForCTC(ParakeetForCTC):
    """``ParakeetForCTC`` whose layers have the sizes that its configuration lists."""

    config_class = ParakeetSlimConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encoder: Any = self.encoder
        for layer, sizes in zip(encoder.layers, config.layer_sizes, strict=True):
            _resize(layer, sizes)
        self.loss_type = "ForCTC"  # otherwise guessed from the name of the class
        self.post_init()  # type: ignore[no-untyped-call]


AutoConfig.register(ParakeetSlimConfig.model_type, ParakeetSlimConfig)
AutoModelForCTC.register(ParakeetSlimConfig, ParakeetSlimForCTC)


def shaped(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of these tensors in evaluation mode, in their precision; ``model`` lends its configuration.

    Raises: ModelError if the tensors are not those of a Parakeet.
    """
    stock: Any = model
    sizes = layer_sizes(tensors)
    encoder = copy.deepcopy(stock.config.encoder_config.to_dict())
    head_dim = encoder.get("head_dim", encoder["hidden_size"] // encoder["num_attention_heads"])
    widest = {
        "num_hidden_layers": len(sizes),
        "intermediate_size": max(1, *(max(s["ff1"], s["ff2"]) for s in sizes)),
        "num_attention_heads": max(1, *(s["heads"] for s in sizes)),
        "head_dim": head_dim,
    }
    encoder.update(widest)
    encoder.pop("num_key_value_heads", None)
    settings = {"vocab_size": stock.config.vocab_size, "pad_token_id": stock.config.pad_token_id}
    alike = all(s == sizes[0] for s in sizes) and sizes[0]["conv"] and sizes[0]["ff1"] == sizes[0]["ff2"]
    new: Any
    if alike and sizes[0]["ff1"] and sizes[0]["heads"]:
        new = ParakeetForCTC(ParakeetCTCConfig(**settings, encoder_config=encoder))
    else:
        config: Any = ParakeetSlimConfig(**settings, encoder_config=encoder)
        config.layer_sizes = [dict(s) for s in sizes]
        new = ParakeetSlimForCTC(config)
    new.generation_config = copy.deepcopy(stock.generation_config)
    new.to(next(iter(tensors.values())).dtype)
    missing, unexpected = new.load_state_dict(dict(tensors), strict=False)
    if missing or unexpected:
        raise ModelError(f"tensors that make no Parakeet: {missing} missing, {unexpected} not known")
    new.set_attn_implementation(stock.config.encoder_config._attn_implementation)
    result: PreTrainedModel = new.eval()
    return result


def layer_sizes(tensors: Mapping[str, Tensor]) -> list[LayerSizes]:
    """Read off the shapes of the tensors, layer by layer."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor

    def rows(layer: dict[str, Tensor], name: str) -> int:
        return len(layer[name]) if name in layer else 0

    return [
        LayerSizes(
            ff1=rows(layer, "feed_forward1.linear1.weight"),
            ff2=rows(layer, "feed_forward2.linear1.weight"),
            heads=rows(layer, "self_attn.bias_u"),
            conv="conv.pointwise_conv1.weight" in layer,
        )
        for _, layer in sorted(found.items())
    ]


def _resize(layer: Any, sizes: LayerSizes) -> None:
    """Fresh modules of the right size; a part of size zero is absent, as in narrowing."""
    D = layer.self_attn.q_proj.in_features
    for name, units in (("feed_forward1", sizes["ff1"]), ("feed_forward2", sizes["ff2"])):
        ff = layer.get_submodule(name)
        if not units:
            setattr(layer, name, Absent())
            continue
        bias = ff.linear1.bias is not None
        ff.linear1, ff.linear2 = nn.Linear(D, units, bias), nn.Linear(units, D, bias)
    attention, heads = layer.self_attn, sizes["heads"]
    if heads:
        # a configuration of its own: Transformers' attention reads its number of heads there
        own = copy.copy(attention.config)
        own.num_attention_heads = own.num_key_value_heads = heads
        layer.self_attn = type(attention)(own, attention.layer_idx)
        # a view of the shared one, or the way that attention is computed could not be chosen later
        layer.self_attn.config = ConfigView(attention.config, num_attention_heads=heads, num_key_value_heads=heads)
    else:
        layer.self_attn = NoAttention()
    if not sizes["conv"]:
        layer.conv = Absent()


class NoAttention(Absent):
    """Attention that is not there; the stock module returns its weights as well."""

    def forward(self, *inputs: Tensor, **more: Tensor) -> Any:
        """Zero, and no weights."""
        return super().forward(*inputs, **more), None


class ConfigView:
    """A configuration with some values of its own; everything else is read through, whenever it changes."""

    def __init__(self, config: Any, **own: object) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for methods before there is a _config
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)
