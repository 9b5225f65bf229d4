"""Accelerate: prepared models, and hooks that keep the weights elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bigramx
from tests.integration import framework
from tests.scripts import IDX, TARGETS, TOKENS, B, Model, T, V, assert_same, grads_of, loss_of, mean_loss, state_of

accelerate = framework("accelerate")
hooks = framework("accelerate.hooks")
ModelHook: Any = hooks.ModelHook

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("steps", [1, 2])
def test_training(tmp_path: Path, mixed_precision: str, steps: int) -> None:
    def compute(base: type[Model]) -> object:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=steps
        )
        generator = torch.Generator().manual_seed(4)
        loader = DataLoader(TensorDataset(*torch.randint(V, (2, 6 * B, T), generator=generator)), batch_size=B)
        model = base(V)
        kind = bigramx.optim.AdamW if base is bigramx.BigramLanguageModel else torch.optim.AdamW
        model, optimizer, loader = accelerator.prepare(model, kind(model.parameters(), lr=0.1), loader)
        losses = []
        for number, (idx, targets) in enumerate(loader):
            with accelerator.accumulate(model):
                _logits, loss = model(idx, targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            losses.append((loss.dtype, loss.detach()))
            if number == 3:
                accelerator.save_state(tmp_path / base.__module__)
        before = state_of(model)
        accelerator.load_state(tmp_path / base.__module__)
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.manual_seed(2)
        return losses, before, state_of(model), model.generate(IDX, 10), unwrapped(IDX, TARGETS)

    assert_same(compute)


class Doubles(ModelHook):
    def post_forward(self, _module: torch.nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def hook_on_the_table(model: Model, path: Path) -> Model:
    hooks.add_hook_to_module(model.token_embedding_table, Doubles())
    return model


def hook_on_the_table_removed(model: Model, path: Path) -> Model:
    hook_on_the_table(model, path)
    hooks.remove_hook_from_module(model.token_embedding_table)
    return model


def hooks_one_after_another(model: Model, path: Path) -> Model:
    hook_on_the_table(model, path)
    hooks.add_hook_to_module(model.token_embedding_table, Doubles(), append=True)
    return model


def aligned(model: Model, path: Path) -> Model:
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    return model


def offloaded_to_memory(model: Model, path: Path) -> Model:
    return accelerate.cpu_offload(model, execution_device="cpu")


def offloaded_to_disk(model: Model, path: Path) -> Model:
    return accelerate.disk_offload(model, path, execution_device="cpu")


def dispatched(model: Model, path: Path) -> Model:
    return accelerate.dispatch_model(model, {"token_embedding_table": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded_in_part(model: Model, path: Path) -> Model:
    device_map = {"token_embedding_table": "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=path, force_hooks=True)


def loaded_and_dispatched(model: Model, path: Path) -> Model:
    save_file(model.state_dict(), path / "model.safetensors")
    with accelerate.init_empty_weights():
        empty = type(model)(V)
    return accelerate.load_checkpoint_and_dispatch(empty, str(path), {"": "cpu"}, force_hooks=True)


def cast_by_layer(model: Model, path: Path) -> Model:
    accelerate.big_modeling.attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
    return model


TREATMENTS = [
    hook_on_the_table,
    hook_on_the_table_removed,
    hooks_one_after_another,
    aligned,
    offloaded_to_memory,
    offloaded_to_disk,
    dispatched,
    offloaded_in_part,
    loaded_and_dispatched,
    cast_by_layer,
]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_hooks(tmp_path: Path, treatment: Callable[[Model, Path], Model]) -> None:
    def compute(base: type[Model]) -> object:
        folder = tmp_path / base.__module__
        folder.mkdir()
        model = treatment(base(V), folder)
        loss = loss_of(model)
        with contextlib.suppress(RuntimeError):  # where the weight is on the disk, as in plain PyTorch
            loss.backward()
        evaluated = mean_loss(model, TOKENS)
        torch.manual_seed(2)
        tokens = model.generate(IDX, 20)
        return model(IDX), loss.detach(), loss.grad_fn is None, grads_of(model), torch.tensor(evaluated), tokens

    assert_same(compute)
