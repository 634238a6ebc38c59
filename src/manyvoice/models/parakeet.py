"""Parakeet with a CTC head: a FastConformer encoder (Rekesh et al., arXiv:2305.05084) as Transformers runs it.

B  utterances   T  encoder frames   F  mel bins   D  model width   V  vocabulary, blank last
C  channels of the subsampling front end
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCTC, ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC, PreTrainedModel

from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Absent, Anatomy, Component, ComponentKind, Cost, Cut, Family, Site, Tap
from manyvoice.models.batchnorm import MaskedBatchNorm, masked_norms
from manyvoice.models.cost import HOP
from manyvoice.models.parakeet_slim import ConfigView, NoAttention, ParakeetSlimConfig, shaped
from manyvoice.types import Frames, Padded, Seconds, mask_of

# A feed-forward layer is cut into this many chunks, as OrthoSoftmax does (arXiv:2501.18895).
FF_CHUNKS = 4

_COMMON: dict[str, object] = {
    "subsampling_conv_kernel_size": 3,
    "conv_kernel_size": 9,
    "num_mel_bins": 80,
    # Transformers' defaults are 0.1 each; layerdrop draws a random number per layer, on each rank another one
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    # sqrt(D) in front of a model of normalised features only hides the positions; NVIDIA's newer configs drop it
    "scale_input": False,
}

PRESETS: dict[str, dict[str, object]] = {
    # a laptop: learns in minutes on two cores
    "tiny": _COMMON
    | {
        "hidden_size": 144,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 576,
        "subsampling_factor": 4,
        "subsampling_conv_channels": 32,
    },
    # one GPU
    "small": _COMMON
    | {
        "hidden_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "subsampling_factor": 8,
        "subsampling_conv_channels": 128,
        "activation_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    # a server: the shape of NVIDIA's 110 M models
    "medium": _COMMON
    | {
        "hidden_size": 512,
        "num_hidden_layers": 17,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "subsampling_factor": 8,
        "subsampling_conv_channels": 256,
        "activation_dropout": 0.1,
        "attention_dropout": 0.1,
    },
}


@final
class ParakeetCTC(Family):
    """``ParakeetForCTC``."""

    name = "parakeet-ctc"
    head = "ctc"

    def matches(self, model: PreTrainedModel) -> bool:
        """Any ``ParakeetForCTC``."""
        return isinstance(model, ParakeetForCTC)

    def claims(self, model_type: str) -> bool:
        """``parakeet_ctc``, or ours with layers of unequal shape."""
        return model_type in (ParakeetCTCConfig.model_type, ParakeetSlimConfig.model_type)

    def presets(self) -> Mapping[str, Mapping[str, object]]:
        """``tiny``, ``small``, ``medium``."""
        return PRESETS

    def build(self, settings: Mapping[str, object], *, vocabulary: int, blank: int) -> PreTrainedModel:
        """A ``ParakeetForCTC`` with random weights. ModelError names a setting that does not exist or fit."""
        model = ParakeetForCTC(self.config(settings, vocabulary=vocabulary, blank=blank))
        _draw_again(model)
        self.prepare_training(model)
        return model

    def config(self, settings: Mapping[str, object], *, vocabulary: int, blank: int) -> ParakeetCTCConfig:
        """The stock configuration of these settings; raises as :meth:`build` does."""
        known = set(ParakeetEncoderConfig().to_dict())
        for name in settings:
            if name not in known:
                raise ModelError(f"model.{name}: Parakeet's encoder has no such setting; it has {sorted(known)}")
        try:
            encoder = ParakeetEncoderConfig(**settings)  # type: ignore[arg-type]
        except Exception as error:  # the strict config raises its own types
            raise ModelError(f"model settings {dict(settings)}: {error}") from error
        if encoder.hidden_size % encoder.num_attention_heads:
            raise ModelError(
                f"model.hidden_size = {encoder.hidden_size} must divide by model.num_attention_heads = "
                f"{encoder.num_attention_heads}; use {encoder.hidden_size // encoder.num_attention_heads} x heads"
            )
        return ParakeetCTCConfig(vocab_size=vocabulary, pad_token_id=blank, encoder_config=encoder)

    def features(self, model: PreTrainedModel) -> dict[str, object]:
        """80 mel bins of 25 ms every 10 ms."""
        return {"feature_size": self._encoder(model).config.num_mel_bins, "sampling_rate": 16000, "hop_length": 160}

    def load(self, folder: str, **options: object) -> PreTrainedModel:
        """From a folder, safetensors only, its BatchNorm under our rule."""
        stock: Any = AutoModelForCTC  # a ParakeetForCTC, or a registered slim one
        model: PreTrainedModel = stock.from_pretrained(folder, use_safetensors=True, **options)
        self.prepare_training(model)
        return model

    def renewed(self, model: PreTrainedModel, *, vocabulary: int, blank: int) -> PreTrainedModel:
        """The encoder as it is under a new head with random weights."""
        encoder = self._encoder(model)
        config: Any = copy.deepcopy(model.config)
        config.vocab_size, config.pad_token_id = vocabulary, blank
        # of its own class: a slim one has layers that the stock class has not
        like: Any = type(model)
        fresh: Any = like(config)
        _draw_again(fresh)
        new: PreTrainedModel = fresh.to(model.dtype)
        self.prepare_training(new)
        self._encoder(new).load_state_dict(encoder.state_dict())
        return new

    def prepare_training(self, model: PreTrainedModel) -> None:
        """Statistics without padding, and relative positions projected once a batch instead of once an utterance."""
        encoder = self._encoder(model)
        if _first_row_expanded in encoder.encode_positions._forward_hooks.values():
            return
        encoder.encode_positions.register_forward_hook(_first_row_expanded)
        for layer in encoder.layers:
            if not isinstance(layer.conv, Absent):
                layer.conv.norm = MaskedBatchNorm.around(layer.conv.norm)
            if not isinstance(layer.self_attn, Absent):
                layer.self_attn.relative_k_proj = _PositionProjection.around(layer.self_attn.relative_k_proj)

    def encode(self, model: PreTrainedModel, features_BTF: Tensor, len_B: Tensor) -> Padded:
        """Encoder output B T D and its lengths."""
        encoder = self._encoder(model)
        mask_BT = mask_of(len_B, features_BTF.shape[1])
        out_len_B = self._lengths(model, len_B)
        norms = list(masked_norms(encoder))
        if any(norm.training for norm in norms):
            longest = int(self._lengths(model, torch.tensor([features_BTF.shape[1]])))
            valid_BT = mask_of(out_len_B, longest)
            for norm in norms:
                norm.see(valid_BT)
        out = encoder(features_BTF, attention_mask=mask_BT)
        return Padded(x=out.last_hidden_state, len_B=out_len_B)

    def logits(self, model: PreTrainedModel, encoded: Padded) -> Padded:
        """CTC scores B T V."""
        head: Any = model.ctc_head
        return Padded(x=head(encoded.x), len_B=encoded.len_B)

    def encoder_frames(self, model: PreTrainedModel, frames: int) -> Frames:
        """Each strided convolution halves, rounding up."""
        return Frames(int(self._lengths(model, torch.tensor([frames]))))

    def encoder_shift(self, model: PreTrainedModel) -> Seconds:
        """10 ms times the subsampling factor."""
        return Seconds(HOP * self._encoder(model).config.subsampling_factor)

    def blank(self, model: PreTrainedModel) -> int:
        """Transformers calls the blank the padding token."""
        return int(model.config.pad_token_id)

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        """Sites, components and taps of the encoder; a feed-forward layer has four chunks."""
        encoder = self._encoder(model)
        config = encoder.config
        D = config.hidden_size
        head: Any = model.ctc_head
        sites: list[Site] = []
        components: list[Component] = []
        taps = [Tap(name="encoder.layers.0", layer=-1, width=D)]
        for i, layer in enumerate(encoder.layers):
            sites += _sites(layer, i, D)
            components += _components(layer, i)
            taps.append(Tap(name=f"encoder.layers.{i}", layer=i, width=D))
        return Anatomy(
            layers="encoder.layers",
            depth=len(encoder.layers),
            width=D,
            sites=tuple(sites),
            components=tuple(components),
            taps=tuple(taps),
            front=_front_cost(encoder.subsampling, config),
            head=Cost(_count(head), per_frame=float(head.weight.numel())),
            front_module="encoder.subsampling",
        )

    def resized(self, part: nn.Module, kind: ComponentKind, kept: int) -> Mapping[str, object]:
        """Attention reads its number of heads in the configuration, which all layers share."""
        if kind != "head":
            return {}
        attention: Any = part
        return {"config": ConfigView(attention.config, num_attention_heads=kept, num_key_value_heads=kept)}

    def dropouts(self, kind: ComponentKind) -> tuple[str, ...]:
        """Of activations in a feed-forward layer, of weights in attention."""
        return {"ff_chunk": ("activation_dropout",), "head": ("attention_dropout",)}.get(kind, ())

    def stub(self, kind: ComponentKind) -> nn.Module:
        """Attention returns its weights as well."""
        return NoAttention() if kind == "head" else Absent()

    def shaped(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """A stock ``ParakeetForCTC`` if all layers are of one shape, else a :class:`ParakeetSlimForCTC`."""
        return shaped(model, tensors)

    @staticmethod
    def _encoder(model: PreTrainedModel) -> Any:
        return model.encoder

    @staticmethod
    def _lengths(model: PreTrainedModel, len_B: Tensor) -> Tensor:
        stock: Any = model
        lengths: Tensor = stock._get_subsampling_output_length(len_B)
        return lengths.to(torch.int64)


FAMILY = ParakeetCTC()


def _draw_again(model: nn.Module) -> None:
    """Random weights of linear layers and convolutions as torch draws them: uniform, at most 1/sqrt(inputs).

    Transformers draws all with a standard deviation of 0.02, made for wide layers. A depthwise convolution has nine
    inputs: behind the front end of ``tiny``, the sound is then left with a standard deviation of 1e-4 (2e-7 with a
    subsampling of 8) around its mean, which the first layer norm, of eps 1e-5, cannot lift. NVIDIA's toolkit leaves
    them as torch draws them, too.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()


def _first_row_expanded(module: nn.Module, inputs: tuple[Tensor, ...], positions_BPD: Tensor) -> Tensor:
    """Every utterance of a batch has the same positions: keep one row, seen B times."""
    return positions_BPD[:1].expand_as(positions_BPD)


class _PositionProjection(nn.Linear):
    """The stock projection, of one row of positions where all rows are one row expanded."""

    @classmethod
    def around(cls, stock: nn.Linear) -> _PositionProjection:
        projection = cls.__new__(cls)
        nn.Module.__init__(projection)
        projection.register_parameter("bias", None)
        projection.in_features, projection.out_features = stock.in_features, stock.out_features
        projection.weight = stock.weight
        return projection

    def forward(self, positions_BPD: Tensor) -> Tensor:
        if positions_BPD.stride(0) != 0:
            return super().forward(positions_BPD)
        return super().forward(positions_BPD[:1]).expand(positions_BPD.shape[0], -1, -1)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sites(layer: Any, i: int, D: int) -> list[Site]:
    path = f"encoder.layers.{i}"
    linears = [
        ("feed_forward1.linear1", "ff1.up"),
        ("feed_forward1.linear2", "ff1.down"),
        ("self_attn.q_proj", "attention.query"),
        ("self_attn.k_proj", "attention.key"),
        ("self_attn.v_proj", "attention.value"),
        ("self_attn.o_proj", "attention.out"),
        ("feed_forward2.linear1", "ff2.up"),
        ("feed_forward2.linear2", "ff2.down"),
    ]
    sites = []
    for name, role in linears:
        if isinstance(layer.get_submodule(name.partition(".")[0]), Absent):
            continue
        linear = layer.get_submodule(name)
        into = role.endswith((".down", ".out"))
        sites.append(
            Site(
                name=f"{path}.{name}",
                kind="linear",
                role=role,
                layer=i,
                width_in=linear.in_features,
                width_out=linear.out_features,
                reads_residual=not into,
                writes_residual=into,
            )
        )
    block = Site(
        name=path, kind="stream", role="block", layer=i, width_in=D, width_out=D, reads_residual=True,
        writes_residual=True,
    )  # fmt: skip
    return [*sites, block]


def _components(layer: Any, i: int) -> list[Component]:
    """Chunks of both feed-forward layers, heads, the convolution module, and the layer itself with what is left."""
    found = []
    if not isinstance(layer.feed_forward1, Absent):
        found += _chunks(layer.feed_forward1, i, "feed_forward1", "ff1")
    if not isinstance(layer.self_attn, Absent):
        found += _heads(layer.self_attn, i)
    if not isinstance(layer.conv, Absent):
        found.append(_convolution(layer.conv, i))
    if not isinstance(layer.feed_forward2, Absent):
        found += _chunks(layer.feed_forward2, i, "feed_forward2", "ff2")
    rest = _count(layer) - sum(c.cost.parameters for c in found)
    whole = Component(name=f"layers.{i}", kind="layer", layer=i, index=0, part="", cuts=(), cost=Cost(rest))
    return [*found, whole]


def _convolution(conv: Any, i: int) -> Component:
    """The whole module: its channels are not cut."""
    weights = [conv.get_submodule(n).weight.numel() for n in ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")]
    cost = Cost(_count(conv), per_frame=float(sum(weights)))
    return Component(name=f"layers.{i}.conv", kind="conv", layer=i, index=0, part="conv", cuts=(), cost=cost)


def _chunks(ff: Any, i: int, part: str, short: str) -> list[Component]:
    """Contiguous units of the hidden layer, the same on both sides of the activation."""
    units, width = ff.linear1.out_features, ff.linear1.in_features
    count = min(FF_CHUNKS, units)
    edges = [round(k * units / count) for k in range(count + 1)]
    path = f"encoder.layers.{i}.{part}"
    bias = ff.linear1.bias is not None
    found = []
    for k, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        n = stop - start
        cuts = [Cut(f"{path}.linear1.weight", 0, start, stop), Cut(f"{path}.linear2.weight", 1, start, stop)]
        cuts += [Cut(f"{path}.linear1.bias", 0, start, stop)] if bias else []
        cost = Cost(n * (2 * width + bias), per_frame=2.0 * n * width)
        name = f"layers.{i}.{short}.{k}"
        found.append(Component(name=name, kind="ff_chunk", layer=i, index=k, part=part, cuts=tuple(cuts), cost=cost))
    return found


def _heads(attention: Any, i: int) -> list[Component]:
    """One head: its rows of query, key, value, relative key and biases, its columns of the output."""
    K = attention.head_dim
    D = attention.q_proj.in_features
    path = f"encoder.layers.{i}.self_attn"
    rows = ["q_proj", "k_proj", "v_proj"]
    bias = attention.q_proj.bias is not None
    found = []
    for h in range(attention.q_proj.out_features // K):
        start, stop = h * K, (h + 1) * K
        cuts = [Cut(f"{path}.{n}.weight", 0, start, stop) for n in [*rows, "relative_k_proj"]]
        cuts += [Cut(f"{path}.{n}.bias", 0, start, stop) for n in rows if bias]
        cuts += [Cut(f"{path}.{n}", 0, h, h + 1) for n in ("bias_u", "bias_v")]
        cuts.append(Cut(f"{path}.o_proj.weight", 1, start, stop))
        parameters = 5 * K * D + (3 * K if bias else 0) + 2 * K
        # scores, relative scores over 2T - 1 offsets, and the weighted sum; the offsets are projected once: 2T rows
        cost = Cost(parameters, per_frame=(4.0 + 2.0) * K * D, per_pair=4.0 * K)
        name = f"layers.{i}.head.{h}"
        found.append(Component(name=name, kind="head", layer=i, index=h, part="self_attn", cuts=tuple(cuts), cost=cost))
    return found


def _front_cost(front: Any, config: Any) -> Cost:
    """Convolutions of the front end, counted per encoder frame; each halves time and frequency."""
    per_frame = 0.0
    frames = float(config.subsampling_factor)  # feature frames that make one encoder frame
    bins = float(config.num_mel_bins)
    for layer in front.layers:
        if isinstance(layer, nn.Conv2d):
            stride = layer.stride[0]
            frames, bins = frames / stride, math.floor((bins - 1) / stride) + 1.0
            per_frame += frames * bins * layer.weight.numel()
    return Cost(_count(front), per_frame=per_frame + front.linear.weight.numel())
