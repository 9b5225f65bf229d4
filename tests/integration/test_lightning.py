"""Lightning's Trainer and Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bigramx
from tests.integration import framework
from tests.scripts import B, Model, T, V, assert_same, state_of

lightning = framework("lightning")
LightningModule: Any = lightning.LightningModule
callbacks = framework("lightning.pytorch.callbacks")

pytestmark = pytest.mark.filterwarnings("ignore")  # the framework's, mostly of workers and loggers


class Module(LightningModule):
    def __init__(self, base: type[Model]) -> None:
        super().__init__()
        self.model = base(V)
        self.kind = bigramx.optim.AdamW if base is bigramx.BigramLanguageModel else torch.optim.AdamW
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = self.model(*batch)[1]
        self.log("train_loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", self.model(*batch)[1])

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = self.model(batch[0])[0]
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=0.1)


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    idx, targets = torch.randint(V, (2, 6 * B, T), generator=generator)
    return DataLoader(TensorDataset(idx, targets), batch_size=B)


def trainer(path: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "default_root_dir": path, **quiet, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3},
        {"detect_anomaly": True, "enable_model_summary": True},
        {"callbacks": lambda: [callbacks.ModelPruning("l1_unstructured", amount=0.3)]},
        {"callbacks": lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]},
        {"callbacks": lambda: [callbacks.EMAWeightAveraging(decay=0.9)]},
        {"callbacks": lambda: [callbacks.LambdaCallback(on_after_backward=lambda _trainer, m: halve_gradients(m))]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_fit(tmp_path: Path, options: dict[str, Any]) -> None:
    def compute(base: type[Model]) -> object:
        module = Module(base)
        made = {name: value() if callable(value) else value for name, value in options.items()}
        run = trainer(tmp_path / base.__module__, **made)
        run.fit(module, batches(), batches())
        val_loss = run.validate(module, batches(), verbose=False)
        torch.manual_seed(2)
        return (
            module.losses,
            val_loss,
            run.predict(module, batches()),
            state_of(module),
            module.model.generate(torch.zeros(1, 1, dtype=torch.long), 20),
        )

    is_16_bit = options.get("precision") == "bf16-true"
    assert_same(compute, **({"rtol": 2e-2, "atol": 2e-2} if is_16_bit else {}))


def halve_gradients(module: torch.nn.Module) -> None:
    for param in module.parameters():
        assert param.grad is not None
        param.grad /= 2


def test_continues_from_a_checkpoint(tmp_path: Path) -> None:
    def compute(base: type[Model]) -> object:
        folder = tmp_path / base.__module__
        first = trainer(folder)
        first.fit(Module(base), batches())
        first.save_checkpoint(folder / "run.ckpt", weights_only=False)
        module = Module(base)
        trainer(folder, max_epochs=3).fit(module, batches(), ckpt_path=folder / "run.ckpt", weights_only=False)
        loaded = Module.load_from_checkpoint(folder / "run.ckpt", base=base, weights_only=True)
        return module.losses, state_of(module), state_of(loaded)

    assert_same(compute)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: str) -> None:
    def compute(base: type[Model]) -> object:
        fabric = lightning.Fabric(accelerator="cpu", precision=precision)
        model = base(V)
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        losses = []
        for idx, targets in fabric.setup_dataloaders(batches()):
            optimizer.zero_grad()
            logits, loss = wrapped(idx, targets)
            logits.retain_grad()
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.1)
            optimizer.step()
            losses.append((loss.detach(), logits.grad))
        return losses, state_of(model)

    assert_same(compute)
