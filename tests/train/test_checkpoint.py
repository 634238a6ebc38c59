from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from manyvoice.errors import CheckpointError, UsageError
from manyvoice.train import checkpoint
from manyvoice.train.checkpoint import average, load, save, verify
from manyvoice.train.packing import pack_random

TENSORS = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7), "empty": torch.zeros(0, 3)},
    "optimizer": {"state/momentum/weight": torch.full((2, 3), 0.5, dtype=torch.float64)},
}
STATE = {"step": 10, "place": {"epoch": 1, "batch": [1, 2]}, "loss": 0.1, "name": "é", "none": None, "on": True}


def fill(value):
    return {"tensors": {"model": {"w": torch.full((3,), float(value))}}, "state": {"value": value}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# One folder


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "deep" / "a", tensors=TENSORS, state=STATE)
    assert names(tmp_path / "deep") == ["a"]
    assert names(tmp_path / "deep" / "a") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    loaded = load(tmp_path / "deep" / "a")
    assert loaded.state == STATE
    assert loaded.tensors.keys() == TENSORS.keys()
    for file, group in TENSORS.items():
        assert loaded.tensors[file].keys() == group.keys()
        for name, x in group.items():
            assert torch.equal(loaded.tensors[file][name], x) and loaded.tensors[file][name].dtype == x.dtype


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64, torch.complex64]
)
def test_every_type_comes_back(tmp_path, dtype):
    x = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    save(tmp_path / "a", tensors={"model": {"x": x}}, state={})
    found = load(tmp_path / "a").tensors["model"]["x"]
    assert found.dtype == dtype and torch.equal(found, x)


def test_shared_and_transposed_tensors_are_stored_whole(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save(tmp_path / "a", tensors={"model": {"a": x, "tied": x, "row": x[1], "turned": x.T}}, state={})
    found = load(tmp_path / "a").tensors["model"]
    assert torch.equal(found["a"], x) and torch.equal(found["tied"], x)
    assert torch.equal(found["row"], x[1]) and torch.equal(found["turned"], x.T)


def test_loaded_tensors_outlive_their_file(tmp_path):
    save(tmp_path / "a", tensors=TENSORS, state={})
    found = load(tmp_path / "a").tensors["model"]["weight"]
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(found, TENSORS["model"]["weight"])


def test_a_loss_that_is_not_finite_is_no_reason_to_lose_a_checkpoint(tmp_path):
    save(tmp_path / "a", tensors={}, state={"loss": math.nan, "best": math.inf})
    state = load(tmp_path / "a").state
    assert math.isnan(state["loss"]) and state["best"] == math.inf


def test_all_of_it_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened, fsync = [], os.fsync

    def watched(handle):
        fsync(handle)
        happened.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    save(tmp_path / "a", **fill(1), on_phase=lambda phase: happened.append(phase))
    before, after = happened[: happened.index("placed")], happened[happened.index("placed") :]
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "a").iterdir()}
    assert len(inodes) == 3
    assert {*inodes.values(), (tmp_path / "a").stat().st_ino} <= set(before)
    assert before.index(inodes["manifest.json"]) > max(
        before.index(node) for name, node in inodes.items() if name != "manifest.json"
    )
    assert tmp_path.stat().st_ino in after


def test_saving_leaves_every_random_state_alone(tmp_path):
    before = checkpoint_random()
    save(tmp_path / "a", tensors=TENSORS, state=STATE)
    assert checkpoint_random() == before


def checkpoint_random():
    tensors, state = pack_random()
    return {name: x.tolist() for name, x in tensors.items()}, state


def test_saving_again_replaces_the_old_one(tmp_path):
    save(tmp_path / "a", **fill(1))
    save(tmp_path / "a", **fill(2))
    assert load(tmp_path / "a").state == {"value": 2}
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis is not a checkpoint and will not be overwritten"):
        save(tmp_path / "thesis", **fill(1))
    assert names(tmp_path) == ["thesis"] and names(tmp_path / "thesis") == ["chapter.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"a": {"b": [1, torch.ones(1)]}}}, r"state\['a'\]\['b'\]\[1\] is a Tensor, which JSON cannot hold"),
        ({"state": {"a": {3: 1}}}, r"state\['a'\] has the key 3; JSON keys are strings"),
        ({"tensors": {"../model": {}}}, r"'\.\./model' cannot name a checkpoint file"),
        (
            {"tensors": {"model": {"x": torch.eye(2).to_sparse()}}},
            r"model\.safetensors: tensor 'x' is torch\.sparse_coo",
        ),
        ({"tensors": {"model": {"x": torch.ones(2, device="meta")}}}, r"tensor 'x' is torch\.strided on meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "a", **({"tensors": {}, "state": {}} | change))
    assert names(tmp_path) == []


# Damage


FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "step-00000010"
    save(folder, tensors=TENSORS, state=STATE)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / sound.name))


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(folder, file):
    data = (folder / file).read_bytes()
    for at in range(0, len(data), 1 if file == "manifest.json" else 7):
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << at % 8
        (folder / file).write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
            load(folder)
        assert file in str(caught.value), f"byte {at}: {caught.value}"
    (folder / file).write_bytes(data)
    verify(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["cut", "emptied", "longer", "missing", "folder", "link"])
def test_other_harm_is_found_too(folder, file, harm, tmp_path):
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif harm != "missing":
        path.write_bytes({"cut": data[:-5], "emptied": b"", "longer": data + b"\0"}[harm])
    if harm == "link" and file == "manifest.json":
        verify(folder)  # its content is what counts
        return
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load(folder)


def test_an_unknown_file_is_refused(folder):
    (folder / "extra.pt").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"extra\.pt is not in manifest\.json; remove it if you know"):
        load(folder)


def test_a_foreign_version_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({"format": "manyvoice.checkpoint.v9"}))
    rule = r"manifest\.json has format 'manyvoice\.checkpoint\.v9', but this version reads 'manyvoice\.checkpoint\.v1'"
    with pytest.raises(CheckpointError, match=rule):
        load(folder)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"format": "manyvoice.checkpoint.v1", "files": 3}', "[" * 100_000]
)
def test_a_manifest_of_another_shape_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json (is damaged|has format 'none')"):
        load(folder)


def forge(folder):
    """Rewrite the manifest for what is there: hashes hold, as if saved so."""
    entries = {p.name: (p.stat().st_size, checkpoint.hash_of(p)) for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "manifest.json").write_bytes(checkpoint._manifest(entries))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_a_pickle_in_disguise_is_refused_and_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(folder)
    forge(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load(folder)
    torch.save({"weight": torch.ones(2)}, folder / "model.safetensors")
    forge(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("text", "rule"), [("[1]", "must hold an object"), ("{", "is not JSON"), ("\ud800", "is not JSON")]
)
def test_a_state_that_is_no_json_object_is_refused(folder, text, rule):
    (folder / "state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    forge(folder)
    with pytest.raises(CheckpointError, match=rf"state\.json {rule}"):
        load(folder)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing, so this checkpoint was never finished"):
        load(tmp_path / "half")


# Averaging


def test_the_average_is_a_mean_in_double_precision(tmp_path):
    folders = []
    for i in range(3):
        x = torch.tensor([1e8 + 4 * i, 2.0 * i, -1.0])
        group = {"x": x, "half": x[1:].to(torch.bfloat16), "count": torch.tensor(10 * i), "z": torch.tensor(1j * i)}
        folders.append(tmp_path / str(i))
        save(folders[-1], tensors={"model": group}, state={})
    found = average(folders)
    expected = torch.stack([torch.tensor([1e8 + 4 * i, 2.0 * i, -1.0]).double() for i in range(3)]).mean(0).float()
    assert torch.equal(found["x"], expected)
    assert torch.equal(found["half"], torch.tensor([2.0, -1.0], dtype=torch.bfloat16))
    assert found["count"] == 20 and found["count"].dtype == torch.int64, "integers come from the last"
    assert found["z"] == 1j
    for name, x in average(folders[:1]).items():
        assert torch.equal(x, load(folders[0]).tensors["model"][name]), "the average of one is itself"


def test_checkpoints_that_do_not_match_are_not_averaged(tmp_path):
    groups = [{"w": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.ones(2).double()}, {"v": torch.ones(2)}]
    folders = [tmp_path / str(i) for i in range(4)]
    for folder, group in zip(folders, groups, strict=True):
        save(folder, tensors={"model": group}, state={})
    with pytest.raises(CheckpointError, match=r"tensor 'w' is \(3,\) torch\.float32, but \(2,\) torch\.float32"):
        average([folders[0], folders[1]])
    with pytest.raises(CheckpointError, match=r"tensor 'w' is \(2,\) torch\.float64, but"):
        average([folders[0], folders[2]])
    with pytest.raises(CheckpointError, match=r"tensor 'v' is not in all the checkpoints"):
        average([folders[0], folders[3]])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is not in this checkpoint; it holds \['model'\]"):
        average([folders[0]], "ema")
    with pytest.raises(UsageError, match="there is nothing to average"):
        average([])
