"""One contract for every model family, present and future; a second family shows that one file is enough."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import final

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sizes import Grid
from manyvoice.elastic.subnet import Subnet, whole
from manyvoice.models.anatomy import (
    Anatomy,
    Component,
    Cost,
    Cut,
    Family,
    Site,
    Tap,
    families,
    family_of,
    parameter_count,
    register,
    unregister,
)
from manyvoice.models.parakeet import FAMILY as PARAKEET
from manyvoice.types import Frames, Padded, Seconds, mask_of

VOCABULARY, BLANK = 7, 6


class ThrowawayConfig(PreTrainedConfig):
    model_type = "throwaway"

    def __init__(self, width: int = 8, units: int = 12, depth: int = 3, vocab_size: int = VOCABULARY, **rest: object):
        self.width, self.units, self.depth, self.vocab_size = width, units, depth, vocab_size
        super().__init__(**rest)


class Throwaway(PreTrainedModel):
    """Residual blocks of two linear maps on every frame."""

    config_class = ThrowawayConfig

    def __init__(self, config: ThrowawayConfig) -> None:
        super().__init__(config)
        self.front = nn.Linear(80, config.width)
        blocks = [nn.Sequential(nn.Linear(config.width, config.units), nn.ReLU(), nn.Linear(config.units, config.width))
                  for _ in range(config.depth)]  # fmt: skip
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(config.width, config.vocab_size)
        self.post_init()


@final
class ThrowawayFamily(Family):
    name = "throwaway"
    head = "ctc"

    def matches(self, model: PreTrainedModel) -> bool:
        return isinstance(model, Throwaway)

    def claims(self, model_type: str) -> bool:
        return model_type == "throwaway"

    def presets(self) -> Mapping[str, Mapping[str, object]]:
        return {"throwaway-tiny": {"width": 8}}

    def build(self, settings: Mapping[str, object], *, vocabulary: int, blank: int) -> PreTrainedModel:
        return Throwaway(ThrowawayConfig(vocab_size=vocabulary, pad_token_id=blank, **settings))  # type: ignore[arg-type]

    def load(self, folder: str, **options: object) -> PreTrainedModel:
        return Throwaway.from_pretrained(folder, **options)

    def features(self, model: PreTrainedModel) -> dict[str, object]:
        return {"feature_size": 80}

    def encode(self, model: PreTrainedModel, features_BTF: Tensor, len_B: Tensor) -> Padded:
        x_BTD = model.front(features_BTF)
        for block in model.blocks:
            x_BTD = x_BTD + block(x_BTD)
        return Padded(x=x_BTD * mask_of(len_B, x_BTD.shape[1])[:, :, None], len_B=len_B)

    def logits(self, model: PreTrainedModel, encoded: Padded) -> Padded:
        return Padded(x=model.out(encoded.x), len_B=encoded.len_B)

    def encoder_frames(self, model: PreTrainedModel, frames: int) -> Frames:
        return Frames(frames)

    def encoder_shift(self, model: PreTrainedModel) -> Seconds:
        return Seconds(0.01)

    def blank(self, model: PreTrainedModel) -> int:
        return int(model.config.pad_token_id)

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        D, U = model.config.width, model.config.units
        sites, components, taps = [], [], [Tap(name="blocks.0", layer=-1, width=D)]
        for i in range(model.config.depth):
            sites.append(Site(name=f"blocks.{i}.0", kind="linear", role="up", layer=i, width_in=D, width_out=U,
                              reads_residual=True, writes_residual=False))  # fmt: skip
            half = U // 2
            for k, (a, b) in enumerate(((0, half), (half, U))):
                cuts = (Cut(f"blocks.{i}.0.weight", 0, a, b), Cut(f"blocks.{i}.0.bias", 0, a, b),
                        Cut(f"blocks.{i}.2.weight", 1, a, b))  # fmt: skip
                cost = Cost((b - a) * (2 * D + 1), per_frame=2.0 * (b - a) * D)
                components.append(Component(name=f"layers.{i}.ff.{k}", kind="ff_chunk", layer=i, index=k, part="",
                                            cuts=cuts, cost=cost))  # fmt: skip
            components.append(Component(name=f"layers.{i}", kind="layer", layer=i, index=0, part="", cuts=(),
                                        cost=Cost(D)))  # fmt: skip
            taps.append(Tap(name=f"blocks.{i}", layer=i, width=D))
        return Anatomy(layers="blocks", depth=model.config.depth, width=D, sites=tuple(sites),
                       components=tuple(components), taps=tuple(taps), front=Cost(81 * D, per_frame=80.0 * D),
                       head=Cost((D + 1) * VOCABULARY, per_frame=float(D * VOCABULARY)))  # fmt: skip


SMALL = {
    "parakeet-ctc": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "subsampling_factor": 4,
        "subsampling_conv_channels": 8,
        "dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "num_mel_bins": 80,
    }
}


@pytest.fixture(scope="module", autouse=True)
def throwaway() -> Iterator[Family]:
    family = register(ThrowawayFamily())
    yield family
    unregister(family)


@pytest.fixture(params=["parakeet-ctc", "throwaway"])
def family(request: pytest.FixtureRequest) -> Family:
    return next(f for f in families() if f.name == request.param)


@pytest.fixture
def model(family: Family) -> PreTrainedModel:
    built = family.build(SMALL.get(family.name, {}), vocabulary=VOCABULARY, blank=BLANK).double().eval()
    for parameter in built.parameters():  # biases and norms away from their plain starting values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def test_all_families_are_under_test(throwaway: Family) -> None:
    assert {f.name for f in families()} == {"parakeet-ctc", "throwaway"}, "a new family? add it to this file's list"


def test_a_family_is_found_by_its_model(family: Family, model: PreTrainedModel) -> None:
    assert family_of(model) is family


def test_sites_name_modules_of_their_widths(family: Family, model: PreTrainedModel) -> None:
    anatomy = family.anatomy(model)
    assert len({s.key for s in anatomy.sites}) == len(anatomy.sites)
    for site in anatomy.sites:
        module = model.get_submodule(site.name)
        if site.kind == "linear":
            assert (module.in_features, module.out_features) == (site.width_in, site.width_out)
            assert not site.reads_residual or site.width_in == anatomy.width
            assert not site.writes_residual or site.width_out == anatomy.width
        else:
            assert (site.width_in, site.width_out) == (anatomy.width, anatomy.width)
        assert anatomy.site(site.key) is site


def test_cuts_tile_the_dimension_they_cut(family: Family, model: PreTrainedModel) -> None:
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for component in family.anatomy(model).components:
        for cut in component.cuts:
            spans.setdefault((cut.parameter, cut.dim), []).append((cut.start, cut.stop))
    assert spans
    for (name, dim), pieces in spans.items():
        size = model.get_parameter(name).shape[dim]
        ordered = sorted(pieces)
        assert ordered[0][0] == 0 and ordered[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(ordered)), name


def test_costs_add_up_to_the_model(family: Family, model: PreTrainedModel) -> None:
    anatomy = family.anatomy(model)
    total = sum((c.cost for c in anatomy.components), anatomy.front + anatomy.head)
    assert total.parameters == parameter_count(model)
    for component in anatomy.components:
        cut = sum(
            model.get_parameter(c.parameter).numel()
            // model.get_parameter(c.parameter).shape[c.dim]
            * (c.stop - c.start)
            for c in component.cuts
        )
        assert not component.cuts or cut == component.cost.parameters, component.name


def test_taps_stand_in_order_and_name_modules(family: Family, model: PreTrainedModel) -> None:
    anatomy = family.anatomy(model)
    assert [t.layer for t in anatomy.taps] == list(range(-1, anatomy.depth))
    assert all(model.get_submodule(t.name) is not None and t.width == anatomy.width for t in anatomy.taps)


def test_encoder_frames_are_those_that_come_out(family: Family, model: PreTrainedModel) -> None:
    for frames in (2, 3, 7, 8, 9, 31, 64, 100):
        out = family.encode(model, torch.randn(1, frames, 80, dtype=torch.float64), torch.tensor([frames]))
        assert out.x.shape[1] == int(out.len_B[0]) == family.encoder_frames(model, frames)


@pytest.mark.parametrize("training", [False, True])
def test_padding_never_changes_an_answer(family: Family, model: PreTrainedModel, training: bool) -> None:
    model.train(training)
    len_B = torch.tensor([40, 23, 9])
    x = torch.randn(3, 40, 80, dtype=torch.float64) * mask_of(len_B, 40)[:, :, None]
    tight = family.logits(model, family.encode(model, x, len_B))
    loose = family.logits(model, family.encode(model, nn.functional.pad(x, (0, 0, 0, 17)), len_B))
    assert torch.equal(tight.len_B, loose.len_B)
    for b, n in enumerate(tight.len_B.tolist()):
        torch.testing.assert_close(tight.x[b, :n], loose.x[b, :n], atol=1e-12, rtol=1e-12)
        if not training:
            alone = family.logits(model, family.encode(model, x[b : b + 1, : len_B[b]], len_B[b : b + 1]))
            torch.testing.assert_close(tight.x[b, :n], alone.x[0], atol=1e-12, rtol=1e-12)


def test_any_component_can_be_dropped_and_comes_back(family: Family, model: PreTrainedModel) -> None:
    elastic = Elastic(model)
    features, len_B = torch.randn(2, 40, 80, dtype=torch.float64), torch.tensor([40, 23])

    def answer() -> Tensor:
        return family.logits(model, family.encode(model, features, len_B)).x

    everything, before = whole(elastic.anatomy), answer()
    for component in elastic.anatomy.components:
        gone = {c.name for c in elastic.anatomy.components if c.name.startswith(component.name)}
        with elastic.at(Subnet(name="less", kept=everything.kept - gone)):
            less = answer()
        assert less.shape == before.shape and not torch.equal(less, before), component.name
        assert torch.equal(answer(), before)


def test_a_chunk_or_a_head_that_is_dropped_is_one_that_says_nothing(family: Family, model: PreTrainedModel) -> None:
    """What is left is what the whole model says with those units' weights set to zero, wherever the family cuts."""
    elastic = Elastic(model)
    features, len_B = torch.randn(2, 40, 80, dtype=torch.float64), torch.tensor([40, 23])
    everything = whole(elastic.anatomy)
    units = [c for c in elastic.anatomy.components if c.kind in ("ff_chunk", "head")]
    assert units
    for component in units:
        silent = copy.deepcopy(model)
        with torch.no_grad():
            for cut in component.cuts:
                silent.get_parameter(cut.parameter).narrow(cut.dim, cut.start, cut.stop - cut.start).zero_()
        expected = family.logits(silent, family.encode(silent, features, len_B)).x
        with elastic.at(Subnet(name="less", kept=everything.kept - {component.name})):
            found = family.logits(model, family.encode(model, features, len_B)).x
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=component.name)


def test_uniform_subnets_shrink_the_costs_that_are_claimed(family: Family, model: PreTrainedModel) -> None:
    grid = Grid(model, family)
    shares = [grid.share(grid.subnet(shape, "")) for shape in grid.shapes()]
    assert max(shares) == pytest.approx(1.0) and min(shares) < 0.5 and len(set(shares)) > 3


def test_a_second_family_of_the_same_name_is_refused() -> None:
    with pytest.raises(Exception, match="registered already; give yours another name"):
        register(PARAKEET)
