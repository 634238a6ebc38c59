"""Two processes do what one does: the same log, gradients and weights, but for the order of additions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from manyvoice.config import make_run
from manyvoice.recipes.train import train
from manyvoice.train.metrics import TIMINGS, read_metrics


def run_file(folder: Path, corpus: Path, settings: dict[str, int], elastic: dict[str, object] | None = None) -> Path:
    """Dropout, ragged last steps and masked BatchNorm, in double precision."""
    run = {
        "output": str(folder / "run"),
        "corpus": {"train": str(corpus), "dev_share": 0.2},
        "tokenizer": {"kind": "words"},
        "model": {"settings": {**settings, "activation_dropout": 0.1, "dropout": 0.1}},
        "batch": {"seconds": 3, "bins": 2, "layout": "bins", "accumulate": 2},
        "augment": {"freq_width": 20},
        "elastic": elastic,
        "train": {"epochs": 2, "precision": "fp64", "average": 2},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def torchrun(processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Start the command under torchrun on this machine alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = Path(__file__).with_name("launch.py")
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, words)], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "elastic",
    [None, {"sizes": [1.0, 0.75, 0.5], "others": 2, "named": 0.5}, {"sizes": [1.0, 0.5], "sandwich": False}],
)
def test_two_processes_equal_one(
    tmp_path: Path,
    speak_tones: Callable[[Path, int, int], Path],
    tiny_settings: dict[str, int],
    elastic: dict[str, object] | None,
) -> None:
    corpus = speak_tones(tmp_path / "tones", 19, 0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_file(tmp_path / "one", corpus, tiny_settings, elastic)
    train(make_run(json.loads(alone.read_text())))
    done = torchrun(2, "train", run_file(tmp_path / "two", corpus, tiny_settings, elastic), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"], "one document, from the first process"
    one, two = (read_metrics(tmp_path / name / "run") for name in ("one", "two"))
    assert len(one) == len(two)
    # steps of 2 + 2 and 4 + 4, and in each bin a last one of a single micro-batch, which a rank fills up
    assert {line["utterances"] for line in one} == {4, 8, 1, 3}
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - TIMINGS:
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12), (key, a["step"])
    newest = sorted(p.name for p in (tmp_path / "one" / "run" / "checkpoints").iterdir())[-1]
    files = [f"checkpoints/{newest}/model", f"checkpoints/{newest}/optimizer", "model/model"]
    for file in files:  # parameters and statistics; moments of the gradients; the mean of two checkpoints
        ours, theirs = (load_file(tmp_path / name / "run" / f"{file}.safetensors") for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            within = 1e-6 if file == "model/model" else 1e-10  # the model is stored in float32
            if "depthwise_conv.bias" in key or "conv.norm.running_mean" in key:
                # in front of a batch norm: its gradient is zero but for rounding, which ScaledAdam divides by 1e-8
                within = max(within, 1e-8)
            assert_close(tensor, theirs[key], atol=within, rtol=within, msg=lambda m, at=f"{file} {key}": f"{at}: {m}")


@pytest.mark.slow
def test_ranks_that_do_not_divide_a_step_are_refused(
    tmp_path: Path, speak_tones: Callable[[Path, int, int], Path], tiny_settings: dict[str, int]
) -> None:
    path = run_file(tmp_path, speak_tones(tmp_path / "tones", 8, 0), tiny_settings)
    done = torchrun(3, "train", path)
    assert done.returncode != 0
    assert "3 ranks cannot share the 2 micro-batches of a step equally; start 1 or 2" in done.stderr


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(
    tmp_path: Path, speak_tones: Callable[[Path, int, int], Path], tiny_settings: dict[str, int]
) -> None:
    path = run_file(tmp_path, speak_tones(tmp_path / "tones", 19, 0), tiny_settings)
    huge = ["optimizer.lr=1e300", "optimizer.clip=null", "optimizer.schedule=constant"]
    done = torchrun(2, "train", path, *huge)
    assert done.returncode != 0
    assert "manyvoice: the loss is nan at step" in done.stderr
