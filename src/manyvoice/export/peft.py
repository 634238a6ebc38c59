"""LoRA voices in the layout of PEFT, both ways: what PEFT trained becomes a voice, and other servers load our voices.

adapter_config.json            rank, scale and the modules
adapter_model.safetensors      base_model.model.<path>.lora_A.weight R I and .lora_B.weight O R of each module

I  input width   O  output width   R  rank
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.errors import UsageError, VoiceError, WorkError
from manyvoice.models.anatomy import Anatomy, anatomy_of
from manyvoice.models.load import fingerprint
from manyvoice.submodels.bank import Where, parts_of
from manyvoice.submodels.method import Edit, make_method
from manyvoice.submodels.methods.lora import Lora
from manyvoice.submodels.voice import Voice

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
# Entries that do not change what the tensors compute: PEFT 0.21's LoraConfig.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
# Starts that leave the base as it is; the others move part of its weights into the update.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def to_peft(voice: Voice, model: PreTrainedModel, folder: Path, *, base_model: str | None = None) -> Path:
    """Write a LoRA voice as PEFT reads it; returns the folder.

    Its settings, card and fingerprints go along in the metadata of the tensors, which PEFT leaves alone.

    Args: model: the whole base, with the weights that the voice was made for.  base_model: the folder or hub id that
        servers load.
    Raises: VoiceError for a voice that is no LoRA or was not made for the model; WorkError if nothing can be written.
    """
    if not isinstance(voice.method, Lora):
        raise VoiceError(
            f"voice {voice.hash[:12]}: method {voice.method.name} has no form in PEFT, only lora has; merge it (--to "
            "folder), export to ONNX with --voice, or train a lora voice"
        )
    anatomy = anatomy_of(model)
    # the vocabulary is not in the model: who has it compares it, as ``recipes.export`` does
    voice.check(anatomy, base=fingerprint(model), tokenizer=voice.tokenizer)
    sites = voice.method.sites(anatomy)
    tensors = {
        f"{_PREFIX}{site.name}.lora_{part}.weight": voice.tensors[site.key, part].detach().cpu().T.contiguous()
        for site in sites
        for part in ("A", "B")
    }
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True,
        "r": voice.method.rank, "lora_alpha": voice.method.alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "target_modules": sorted(site.name for site in sites), "modules_to_save": None,
    }  # fmt: skip
    ours = {
        "settings": voice.method.settings(), "base": voice.base, "tokenizer": voice.tokenizer, "card": dict(voice.card)
    }  # fmt: skip
    told = {"format": "pt", "manyvoice": json.dumps(ours, sort_keys=True, ensure_ascii=False)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(tensors, told))
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error}); free space or name another folder") from error
    return folder


def from_peft(
    folder: Path, model: PreTrainedModel, *, base: str, tokenizer: str, card: Mapping[str, Any] | None = None
) -> Voice:
    """A voice from a folder that PEFT, or :func:`to_peft`, wrote.

    Args: model: the whole base that it was trained on.  base, tokenizer: fingerprints of the base's weights and of its
        vocabulary, which PEFT does not know.  card: of the voice, for folders without one.
    Raises: VoiceError names the setting, the tensor or the module that a LoRA voice cannot have or lacks.
    """
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors, ours = _read_weights(path)
    for name, given in (("base", base), ("tokenizer", tokenizer)):
        if name in ours and ours[name] != given:
            raise VoiceError(
                f"{path}: was made for the {name} {str(ours[name])[:12]}, but this model's is {given[:12]}; use "
                "the model that it was made for"
            )
    anatomy = anatomy_of(model)
    found = _by_site(tensors, anatomy, path)
    roles = list(dict.fromkeys(site.role for site in anatomy.sites if any((site.key, p) in found for p in "AB")))
    # settings are compared in order, and PEFT keeps none
    for known in (list(Lora().roles), ours["settings"].get("roles", [])):
        roles = known if sorted(known) == sorted(roles) else roles
    try:
        settings = {"rank": int(config["r"]), "alpha": float(config["lora_alpha"]), "roles": roles}
        method = make_method("lora", settings)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise VoiceError(
            f"{folder / CONFIG}: r and lora_alpha must be numbers above 0 ({error!r}); save it again"
        ) from error
    _check_shapes(found, method, anatomy, path)
    voice = Voice(
        method=method, tensors=found, base=base, tokenizer=tokenizer, card=ours["card"] if card is None else card
    )  # fmt: skip
    voice.hash  # noqa: B018 - computing it refuses numbers that are not finite
    return voice


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VoiceError(
            f"{path}: cannot be read ({error}); give a folder that PEFT's save_pretrained wrote"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise VoiceError(f"{path}: peft_type must be LORA; other methods of PEFT have no form here, train a voice")
    if config.get("init_lora_weights") not in _STARTS:
        raise VoiceError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base's weights; save it as "
            "ordinary LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    # what PEFT writes for a plain adapter; whatever else is set may compute something else
    for name, value in config.items():
        plain = name in _HARMLESS or name == "init_lora_weights" or (name == "bias" and value == "none")
        if not plain and value not in (None, False, 0, "", [], {}):
            raise VoiceError(
                f"{path}: {name} = {value!r} has no form in a LoRA voice; train without it, or merge the adapter into "
                "the base with PEFT's merge_and_unload"
            )
    return config


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what :func:`to_peft` told of them, if it wrote them."""
    try:
        with safe_open(str(path), framework="pt") as file:
            told = {"settings": {}, "card": {}} | json.loads((file.metadata() or {}).get("manyvoice", "{}"))
            roles = told["settings"].get("roles", [])
            if not (isinstance(told["card"], dict) and all(isinstance(role, str) for role in roles)):
                raise ValueError("its metadata are no voice's")
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise VoiceError(
            f"{path}: cannot be read ({error}); pickled adapters (.bin) are not loaded: save with safe_serialization"
        ) from error


def _by_site(tensors: Mapping[str, Tensor], anatomy: Anatomy, path: Path) -> dict[Where, Tensor]:
    sites = {site.name: site for site in anatomy.sites if site.kind == "linear"}
    found: dict[Where, Tensor] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise VoiceError(
                f"{path}: {name} {list(tensor.shape)} is no lora_A or lora_B of a linear map; train plain LoRA, "
                "without embeddings, convolutions, biases or modules_to_save"
            )
        if match["path"] not in sites:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in sites}))
            raise VoiceError(
                f"{path}: module {match['path']} is no site of this model; voices edit {known} of its layers; train "
                "with these as target_modules"
            )
        found[sites[match["path"]].key, match["part"]] = tensor.T.contiguous()
    if not found:
        raise VoiceError(f"{path}: holds no tensors; save the adapter again")
    return found


def _check_shapes(found: Mapping[Where, Tensor], method: Edit, anatomy: Anatomy, path: Path) -> None:
    """VoiceError for a layer that lacks its tensors, and for another rank than the settings say."""
    for (key, part), what in parts_of(method, method.sites(anatomy)).items():
        got, wanted = found.get((key, part)), what.shape[::-1]
        if got is None or tuple(got.shape) != what.shape:
            said = "is missing" if got is None else f"is {list(got.shape[::-1])}"
            raise VoiceError(
                f"{path}: lora_{part} of {anatomy.site(key).name} {said}, but must be {list(wanted)}; a voice has "
                "every layer of a role, all with one rank: train without layers_to_transform and rank_pattern"
            )
