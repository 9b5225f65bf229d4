"""PEFT: adapters on the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import framework
from tests.scripts import IDX, TOKENS, Model, V, assert_same, fit, grads_of, loss_of, mean_loss, state_of

peft = framework("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules=["token_embedding_table"], r=3, init_lora_weights=False, **options)


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True, lora_alpha=4),
    "dora": lambda: lora(use_dora=True),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["token_embedding_table"], token_indices=[0, 3, 7], init_weights=False
    ),
    "whole_table": lambda: peft.LoraConfig(target_modules=["absent"], modules_to_save=["token_embedding_table"]),
}
IN_PLACE = ("lora", "rslora", "dora", "trainable_tokens")


@pytest.mark.parametrize("name", IN_PLACE)
def test_adapted(name: str) -> None:
    def compute(base: type[Model]) -> object:
        model = peft.get_peft_model(base(V), CONFIGS[name]())
        loss = loss_of(model)
        loss.backward()
        with model.disable_adapter():
            base_loss = loss_of(model).detach()
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            losses.append(loss_of(model).detach())
        torch.manual_seed(2)
        tokens = model.generate(idx=IDX, max_new_tokens=20)
        merged = model.merge_and_unload()
        torch.manual_seed(2)
        again = merged.generate(IDX, 20)
        return loss.detach(), grads_of(model), base_loss, losses, tokens, loss_of(merged), state_of(merged), again

    assert_same(compute)


@pytest.mark.parametrize("name", IN_PLACE)
def test_injected(name: str) -> None:
    """The model's own methods use the adapter."""

    def compute(base: type[Model]) -> object:
        model = peft.inject_adapter_in_model(CONFIGS[name](), base(V))
        evaluated = mean_loss(model, TOKENS)
        history = fit(model, TOKENS, max_steps=4, eval_interval=3)
        torch.manual_seed(2)
        tokens = model.generate(IDX, 20)
        losses = torch.tensor([evaluated, *history.losses, *history.train_losses])
        return losses, tokens, state_of(model)

    assert_same(compute)


def test_several_adapters() -> None:
    def compute(base: type[Model]) -> object:
        model = peft.get_peft_model(base(V), lora())
        model.add_adapter("other", lora(lora_alpha=3))
        losses = [loss_of(model).detach()]
        model.set_adapter("other")
        losses.append(loss_of(model).detach())
        model.merge_adapter(["default", "other"])
        losses.append(loss_of(model).detach())
        torch.manual_seed(2)
        tokens = model.generate(idx=IDX, max_new_tokens=10)
        model.unmerge_adapter()
        return losses, tokens, loss_of(model).detach(), loss_of(model.unload()).detach()

    assert_same(compute)


def test_saved_and_loaded(tmp_path: Path) -> None:
    def compute(base: type[Model]) -> object:
        torch.manual_seed(5)
        plain = base(V)
        model = peft.get_peft_model(plain, lora())
        model.save_pretrained(tmp_path / base.__module__, save_embedding_layers=False)
        torch.manual_seed(5)
        loaded = peft.PeftModel.from_pretrained(base(V), tmp_path / base.__module__)
        return loss_of(model).detach(), loss_of(loaded).detach(), peft.get_peft_model_state_dict(loaded)

    assert_same(compute)
