"""Opacus: per-sample gradients, which it takes from hooks on the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.integration import framework
from tests.scripts import IDX, TARGETS, B, Model, T, V, assert_same, loss_of, state_of

opacus = framework("opacus")
grad_sample = framework("opacus.grad_sample")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_per_sample_gradients(mode: str) -> None:
    def compute(base: type[Model]) -> Any:
        model = grad_sample.wrap_model(base(V), grad_sample_mode=mode, loss_reduction="mean")
        loss_of(model).backward()
        weight = next(model.parameters())
        assert weight.grad_sample.shape == (B, V, V)
        return weight.grad_sample, weight.grad

    assert_same(compute)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_private_training(mode: str) -> None:
    def compute(base: type[Model]) -> object:
        generator = torch.Generator().manual_seed(4)
        data = TensorDataset(*torch.randint(V, (2, 6 * B, T), generator=generator))
        model, noise = base(V), torch.Generator().manual_seed(5)
        model, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=B),
            noise_multiplier=0.5,
            max_grad_norm=0.1,
            poisson_sampling=False,
            grad_sample_mode=mode,
            noise_generator=noise,
        )
        losses = []
        for idx, targets in loader:
            optimizer.zero_grad()
            _logits, loss = model(idx, targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.manual_seed(2)
        return losses, state_of(model), model._module.generate(IDX, 10), loss_of(model)

    assert_same(compute)


def test_ghost_clipping() -> None:
    def compute(base: type[Model]) -> object:
        model = grad_sample.GradSampleModuleFastGradientClipping(base(V), max_grad_norm=0.1, use_ghost_clipping=True)
        logits, _loss = model(IDX, TARGETS)
        criterion = torch.nn.CrossEntropyLoss(reduction="none")
        criterion(logits, TARGETS.view(-1)).view(B, T).mean(1).sum().backward()
        return model.get_norm_sample(), model.get_clipping_coef()

    assert_same(compute)
