"""Sizes whose layers differ in shape are exported as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import Subnet, whole
from manyvoice.export.onnx import export_onnx


@pytest.mark.timeout(400)  # exporting takes a minute where the cores have other work
def test_layers_of_different_shapes_give_torchs_answers(base: Recogniser, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    elastic = Elastic(base.model)
    everything = whole(elastic.anatomy).kept
    without = {"layers.0.conv", "layers.1.head.3", "layers.1.head.2", "layers.2.ff1.0"}
    assert without < everything
    uneven = extract(elastic, Subnet(name="uneven", kept=everything - without))
    assert type(uneven).__name__ == "ParakeetSlimForCTC"
    uneven.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in uneven.encoder.layers} == {"eager"}
    made = export_onnx(Recogniser(uneven, base.family, base.tokenizer, base.log_mel), tmp_path)
    assert made.parity < 1e-4
