"""ONNX: both exporters, run by ONNX's reference evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration import framework
from tests.scripts import IDX, TARGETS, Model, V, assert_same

onnx = framework("onnx")
framework("onnxscript")
evaluator = framework("onnx.reference")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("with_loss", [True, False])
def test_export(tmp_path: Path, dynamo: bool, with_loss: bool) -> None:
    def compute(base: type[Model]) -> object:
        arguments = (IDX, TARGETS) if with_loss else (IDX,)
        path = tmp_path / f"{base.__module__}.onnx"
        torch.onnx.export(base(V), arguments, str(path), dynamo=dynamo, verbose=False)
        exported = onnx.load(path)
        onnx.checker.check_model(exported)
        session = evaluator.ReferenceEvaluator(exported)
        inputs = {name: value.numpy() for name, value in zip(session.input_names, arguments, strict=True)}
        return [torch.as_tensor(output) for output in session.run(None, inputs)]

    assert_same(compute)
