"""Models by folder, hub id or preset; safetensors only, never remote code.

A hub id is read through Hugging Face's local cache, so with ``HF_HUB_OFFLINE=1`` it works without a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from manyvoice.errors import ModelError, UsageError
from manyvoice.models.anatomy import Family, families

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "README.md"]


def resolve(spec: str | Path) -> Path:
    """The local folder of a model given by folder or hub id. ModelError says what was looked for and where."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give the folder that holds config.json and model.safetensors")
    try:
        return Path(snapshot_download(str(spec), allow_patterns=_PATTERNS))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{spec}: no such folder, and not to be had from the Hugging Face hub or its local cache ({reason}); "
            "give a model folder, or download the model once with `hf download`"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. ModelError if it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner = folder / "model"
        way_out = f"give {inner}, which is one" if (inner / "config.json").is_file() else "give one that has it"
        raise ModelError(f"{folder} holds no config.json, so it is no model folder; {way_out}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); write the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must be a JSON object; write the model again")
    return config


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Family]:
    """The model of a folder, in evaluation mode, and the family that publishes its anatomy.

    Raises: ModelError for an unknown family, weights that are missing, damaged or no safetensors.
    """
    model_type = str(read_config(folder).get("model_type"))
    family = next((f for f in families() if f.claims(model_type)), None)
    if family is None:
        known = ", ".join(f.name for f in families())
        raise ModelError(f"{folder}/config.json: model_type {model_type!r} has no anatomy here; known: {known}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors; pickled weights are not loaded, convert them first")
    try:
        model = family.load(str(folder), dtype=dtype, local_files_only=True)
    except Exception as error:  # safetensors and Transformers raise many types for damaged files
        raise ModelError(f"{folder}: weights cannot be loaded ({type(error).__name__}: {error})") from error
    return model.eval(), family


def build_model(
    preset: str, settings: Mapping[str, object], *, vocabulary: int, blank: int
) -> tuple[PreTrainedModel, Family]:
    """A new model by preset, as ``tiny`` or ``parakeet-ctc/tiny``, with settings changed. UsageError lists presets."""
    wanted_family, _, name = preset.rpartition("/")
    for family in families():
        if wanted_family in ("", family.name) and name in family.presets():
            merged = {**family.presets()[name], **settings}
            return family.build(merged, vocabulary=vocabulary, blank=blank), family
    known = ", ".join(f"{f.name}/{p}" for f in families() for p in f.presets())
    raise UsageError(f"model.preset = {preset!r}: no such preset; known: {known}")


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, stored types and bytes of all parameters and buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
