"""The sizes of a supernet: saved beside it, loaded as models of their own, extracted into folders, compared.

model/subnets/55.json          what the size keeps, its costs and its results
model/subnets/55.safetensors   its own running statistics, where it has any
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.speed import Speed, measure_speed
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic, Plan
from manyvoice.elastic.subnet import Subnet, read_subnet, whole, write_subnet
from manyvoice.errors import ModelError, UsageError, WorkError
from manyvoice.models import batchnorm
from manyvoice.models.anatomy import Anatomy, Component, ComponentKind
from manyvoice.models.cost import AUDIO, by_layer, by_part, cost_of
from manyvoice.recipes.card import measured, read_card, write_derived_card
from manyvoice.recipes.prepare import Prepared
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.train.sandwich import SupernetPasses

FOLDER = "subnets"
# In the folder of a size that was extracted.
SUBNET = "subnet.json"
# Measured runs of one size.
_REPEATS = 5
_UNITS: dict[ComponentKind, str] = {"head": "heads", "ff_chunk": "# chunks"}


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """A named size of a supernet.

    Args: statistics: running statistics of its norms, under the supernet's names; None where it has the supernet's.
        document: all that its file says, costs and results among it.
    """

    subnet: Subnet
    statistics: dict[str, Tensor] | None
    document: dict[str, Any]


def save_sizes(
    folder: Path,
    passes: SupernetPasses,
    forwards: Callable[[], Iterator[Callable[[], object]]],
    prepared: Prepared,
    watcher: Watcher,
    *,
    frozen: bool,
) -> None:
    """Write a trained supernet's sizes, each with its own statistics, measured on dev and test.

    Args: forwards: passes over training data, from which statistics are measured.  frozen: they rested in training, so
        all sizes share them.
    """
    recogniser = prepared.recogniser
    elastic, model = passes.elastic, recogniser.model
    saved = Recogniser(model, recogniser.family, recogniser.tokenizer, recogniser.log_mel, folder)
    for subnet in passes.sampler.sizes:
        own = None if frozen or subnet.kept == whole(elastic.anatomy).kept else elastic.statistics()
        if own is not None:
            with elastic.at(subnet, statistics=own):
                batchnorm.recalibrate(model, forwards())
        size = Size(subnet=subnet, statistics=own, document={})
        small = alone(recogniser, elastic, size)
        corpora = prepared.corpora
        results = measured(small, {"dev": corpora.dev, "test": corpora.test}, watcher, f"size {subnet.name} on")
        costs = cost_of(model, recogniser.family, subnet.kept)
        write_size(saved, size, {"costs": asdict(costs), "results": results})
        shown = ", ".join(f"{role} WER {r['wer']:.2%}" for role, r in results.items())
        watcher.note(f"size {subnet.name}: {costs.parameters / 1e6:.2f} M parameters, {shown}")


def write_size(recogniser: Recogniser, size: Size, more: dict[str, Any]) -> None:
    """Put a size beside the model it belongs to. WorkError if it cannot be written."""
    place, subnet = folder_of(recogniser) / FOLDER, size.subnet
    more = {"own_statistics": size.statistics is not None, **more}
    try:
        place.mkdir(exist_ok=True)
        if size.statistics is not None:
            data = save(_own(Elastic(recogniser.model), subnet, size.statistics))
            aside = place / f"{subnet.name}.safetensors.tmp"
            aside.write_bytes(data)
            aside.replace(place / f"{subnet.name}.safetensors")
            more["statistics"] = _digest(data)
        write_subnet(place / f"{subnet.name}.json", subnet, supernet=recogniser.fingerprint(), more=more)
    except OSError as error:
        raise WorkError(
            f"{place}: size {subnet.name} cannot be written ({error}); free space, or copy the model to a folder that "
            "you may write to"
        ) from error


def read_sizes(folder: Path, recogniser: Recogniser) -> list[Size]:
    """The sizes that lie beside a model, largest first. ModelError for a damaged file or one of another model."""
    anatomy, supernet = recogniser.family.anatomy(recogniser.model), recogniser.fingerprint()
    sizes = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        subnet, document = read_subnet(path, anatomy, supernet=supernet)
        statistics = _statistics_of(path, recogniser, subnet, document) if document.get("own_statistics") else None
        sizes.append(Size(subnet=subnet, statistics=statistics, document=document))
    try:
        return sorted(sizes, key=lambda s: -float(s.document["costs"]["layer_macs"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / FOLDER}: a size does not say what it costs ({error!r}); copy the whole folder again"
        ) from error


def _statistics_of(path: Path, recogniser: Recogniser, subnet: Subnet, document: dict[str, Any]) -> dict[str, Tensor]:
    """The file beside a size's. ModelError for one that is damaged, another size's, or holds anything else."""
    file = path.with_suffix(".safetensors")
    try:
        data = file.read_bytes()
        found = load(data)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); copy the whole folder again") from error
    wanted = {name: t.shape for name, t in _own(Elastic(recogniser.model), subnet).items()}
    whole_and_its_own = {name: t.shape for name, t in found.items()} == wanted and _digest(data) == document.get(
        "statistics", _digest(data)
    )
    if not whole_and_its_own or not all(t.isfinite().all() for t in found.values()):
        raise ModelError(f"{file}: does not hold the statistics of size {subnet.name}; copy the whole folder again")
    return found


def _own(elastic: Elastic, subnet: Subnet, statistics: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of running statistics, those that a size has."""
    inside = tuple(f"{elastic.anatomy.layers}.{i}." for i in elastic.plan(subnet).layers)
    found = elastic.statistics() if statistics is None else statistics
    return {name: t.contiguous() for name, t in found.items() if name.startswith(inside)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def load_size(spec: str | Path, size: str | None, *, device: str = "cpu") -> Recogniser:
    """A model folder as it is, or one of its sizes as a model of its own.

    Raises: UsageError for a size that it does not have, naming those that it has.
    """
    recogniser = Recogniser.load(spec, device=device)
    if size is None:
        return recogniser
    return alone(recogniser, Elastic(recogniser.model), find_size(recogniser, size))


def find_size(recogniser: Recogniser, name: str) -> Size:
    """The size of that name, with or without a per cent sign. UsageError lists the sizes there are."""
    sizes = all_sizes(recogniser)
    for size in sizes:
        if size.subnet.name == name.rstrip("%"):
            return size
    raise UsageError(f"--size {name}: {folder_of(recogniser)} has {', '.join(s.subnet.name for s in sizes)}")


def all_sizes(recogniser: Recogniser) -> list[Size]:
    """As :func:`read_sizes`, but UsageError for a model that has none."""
    folder = folder_of(recogniser)
    sizes = read_sizes(folder, recogniser)
    if not sizes:
        raise UsageError(_without_sizes(folder))
    return sizes


def _without_sizes(folder: Path) -> str:
    try:
        said = json.loads((folder / SUBNET).read_text(encoding="utf-8"))
        supernet, name = str(said["supernet"])[:12], said["name"]
    except FileNotFoundError:
        return f"{folder} has no sizes: it was not trained as a supernet; add `elastic: {{}}` to its run file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / SUBNET}: cannot be read ({error!r}); extract the size again"
    return (
        f"{folder} has no sizes: it was extracted from supernet {supernet} as size {name}; the supernet's folder has "
        "the sizes, so give that one"
    )


def refuse_full(folder: Path) -> None:
    """UsageError for a file, and for a folder that holds something."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UsageError(f"{folder} {'is a file' if folder.is_file() else 'is not empty'}; name a new folder")


def extract_size(spec: str | Path, name: str, output: Path) -> dict[str, Any]:
    """Write a size as a folder of its own, with a card; stock Transformers loads it. Returns the card.

    The folder's ``subnet.json`` keeps the supernet's fingerprint and which of its layers are which of the supernet's,
    so that submodels trained on the supernet still fit.
    Raises: UsageError if the folder holds something already; WorkError if it cannot be written.
    """
    recogniser = Recogniser.load(spec)
    size = find_size(recogniser, name)
    card = read_card(folder_of(recogniser))
    refuse_full(output)
    elastic = Elastic(recogniser.model)
    small = alone(recogniser, elastic, size)
    plan = elastic.plan(size.subnet)
    layers = {"original_layers": list(plan.layers), "voices": _for_voices(elastic.anatomy, plan)}
    document = {k: size.document[k] for k in ("costs", "results")}
    try:
        # first: weights without it would pass for a base of their own
        output.mkdir(parents=True, exist_ok=True)
        write_subnet(output / SUBNET, size.subnet, supernet=recogniser.fingerprint(), more=layers | document)
        small.save(output)
    except (OSError, SafetensorError) as error:  # the second is how the library reports a full disk
        raise WorkError(f"{output}: cannot be written ({error}); free space or name another folder") from error
    return write_derived_card(
        output, small, card, results=size.document["results"],
        command=f"manyvoice subnets {spec} extract {name}",
    )  # fmt: skip


def _for_voices(anatomy: Anatomy, plan: Plan) -> dict[str, Any]:
    """What a folder must say so that voices of the whole model run on it: the whole's sites, and what is left."""
    weights = {f"{site.name}.weight" for site in anatomy.sites}
    slices = {
        name: [[one.dim, [list(r) for r in one.ranges]] for one in found]
        for name, found in plan.slices.items()
        if name in weights
    }
    return {"sites": [asdict(site) for site in anatomy.sites], "slices": slices}


def compare_sizes(
    spec: str | Path, corpus: Corpus | None, *, speed: bool = True, watcher: Watcher | None = None
) -> list[dict[str, Any]]:
    """A row for each size: costs, error rate with its interval, and how fast it runs on one thread.

    Args: corpus: what error rates are measured on; None shows those found at the end of training.
    """
    watcher = watcher or Silent()
    recogniser = Recogniser.load(spec)
    elastic = Elastic(recogniser.model)
    sizes = all_sizes(recogniser)
    rows = []
    largest = sizes[0].document["costs"]["layer_macs"]
    # one corpus for all of them if there is one: sizes that were found later may have been measured on another
    roles = [role for role in ("test", "dev") if len({_heard(size, role) for size in sizes} - {None}) == 1
             and all(role in size.document["results"] for size in sizes)]  # fmt: skip
    for size in sizes:
        small = alone(recogniser, elastic, size)
        costs = size.document["costs"]
        row: dict[str, Any] = {
            "size": size.subnet.name, "parameters": costs["parameters"],
            "layer_macs_share": round(costs["layer_macs"] / largest, 4), "macs": costs["macs"],
        }  # fmt: skip
        if corpus is None:
            role = roles[0] if roles else next((r for r in ("test", "dev") if r in size.document["results"]), "")
            if not role:
                raise UsageError(
                    f"size {size.subnet.name} of {spec} was measured on nothing yet; give a manifest to compare on"
                )
            found = size.document["results"][role]
            role = role if roles else f"{role} ({str(_heard(size, role))[:8]})"
        else:
            name = f"size {size.subnet.name}"
            found = evaluate(
                small,
                corpus,
                progress=partial(watcher.progress, name),
            ).as_dict()
        row |= {"measured_on": "what was given" if corpus is not None else role}
        row |= {"wer": found["wer"], "wer_interval": found.get("wer_interval"), "cer": found["cer"]}
        if speed:
            row["times_real_time"] = round(speed_of(small).rtfx, 1)
        rows.append(row)
    return rows


def _heard(size: Size, role: str) -> str | None:
    """Fingerprint of the corpus that a size was measured on in that role."""
    found: str | None = size.document["results"].get(role, {}).get("corpus")
    return found


def speed_of(recogniser: Recogniser) -> Speed:
    """Of log-probabilities from ready features, ten seconds of noise, on one thread."""
    frames = recogniser.log_mel.frames(AUDIO)
    features_BTF = torch.randn(1, frames, recogniser.log_mel.bins)
    len_B = torch.tensor([frames])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_speed(lambda: recogniser.logp(features_BTF, len_B), AUDIO, warmup=2, repeats=_REPEATS)
    finally:
        torch.set_num_threads(threads)


def alone(recogniser: Recogniser, elastic: Elastic, size: Size) -> Recogniser:
    """A size as a recogniser of its own."""
    model = extract(elastic, size.subnet, statistics=size.statistics)
    model.to(recogniser.device)  # type: ignore[arg-type]  # Transformers wraps nn.Module.to untyped
    return Recogniser(model, recogniser.family, recogniser.tokenizer, recogniser.log_mel)


def folder_of(recogniser: Recogniser) -> Path:
    """Where it was loaded from."""
    assert recogniser.folder is not None, "loaded from a folder"
    return recogniser.folder


def describe(size: Size, whole_model: Size, anatomy: Anatomy) -> str:
    """What a size costs, how good it is, and what it keeps of each layer, for people."""
    costs, most = size.document["costs"], whole_model.document["costs"]
    layers = size.subnet.layers(anatomy)
    dropped = [str(i) for i in range(anatomy.depth) if i not in layers]
    return "\n".join(
        [
            f"size {size.subnet.name} of supernet {size.document['supernet'][:12]}",
            f"parameters: {costs['parameters'] / 1e6:.2f} M, {costs['parameters'] / most['parameters']:.0%} of size "
            f"{whole_model.subnet.name}'s",
            f"MACs of layers: {costs['layer_macs'] / most['layer_macs']:.0%} of size {whole_model.subnet.name}'s",
            f"MACs in {AUDIO:g} s of sound: {costs['macs'] / 1e9:.2f} G, {costs['macs'] / most['macs']:.0%}",
            *(_measured_on(role, found) for role, found in size.document["results"].items()),
            f"layers: {len(layers)} of {anatomy.depth} kept; dropped: {', '.join(dropped) or 'none'}",
            *(_layer(i, components, size.subnet) for i, components in by_layer(anatomy)),
        ]
    )


def _measured_on(role: str, found: dict[str, Any]) -> str:
    interval = found.get("wer_interval")
    around = f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return f"on {role}: WER {found['wer']:.2%}{around}, CER {found['cer']:.2%}"


def _layer(index: int, components: list[Component], subnet: Subnet) -> str:
    if not any(c.name in subnet.kept for c in components if c.kind == "layer"):
        return f"  layer {index}: dropped"
    parts = []
    for _, units in by_part(components):
        # layers.3.ff1.0, or layers.3.conv
        called = units[0].name.split(".")[2]
        kept = [c.index for c in units if c.name in subnet.kept]
        if units[0].kind == "conv":
            parts.append(f"{called} {'kept' if kept else 'dropped'}")
            continue
        which = "" if kept == list(range(len(kept))) else f" (numbers {', '.join(map(str, kept))})"
        parts.append(f"{_UNITS.get(units[0].kind, called)} {len(kept)} of {len(units)}{which}".replace("#", called))
    return f"  layer {index}: {', '.join(parts) or 'kept'}"
