"""Transformers: its Trainer, and a PreTrainedModel around the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.integration import framework
from tests.scripts import IDX, TARGETS, B, Model, T, V, assert_same, state_of

transformers = framework("transformers")
PretrainedConfig: Any = transformers.PretrainedConfig
PreTrainedModel: Any = transformers.PreTrainedModel
GenerationMixin: Any = transformers.GenerationMixin

pytestmark = pytest.mark.filterwarnings("ignore")


class Config(PretrainedConfig):
    model_type = "bigram"

    def __init__(self, vocab_size: int = V, **options: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**options)


class Wrapper(PreTrainedModel, GenerationMixin):
    """Around a model of the class ``base``, which a subclass names."""

    config_class = Config
    base: type[Model]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = self.base(config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.model.token_embedding_table
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.token_embedding_table = value

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_options: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_options: Any) -> Any:
        logits, loss = self.model(input_ids, labels)
        if loss is not None:
            logits = logits.view(*input_ids.shape, -1)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def wrapper_of(base: type[Model]) -> Any:
    return type("Wrapper", (Wrapper,), {"base": base})


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    idx, targets = torch.randint(V, (2, 6 * B, T), generator=generator)
    targets[:, ::3] = -100
    return [{"input_ids": i, "labels": t} for i, t in zip(idx, targets, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "rmsprop"},
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 1, "average_tokens_across_devices": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    def compute(base: type[Model]) -> object:
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(tmp_path / base.__module__),
                "per_device_train_batch_size": B,
                "learning_rate": 0.1,
                "max_steps": 8,
                "logging_steps": 1,
                "eval_steps": 4,
                "eval_strategy": "steps",
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                **options,
            }
        )
        model = wrapper_of(base)(Config())
        trainer = transformers.Trainer(model, arguments, train_dataset=dataset(), eval_dataset=dataset())
        trainer.train()
        keys = ("loss", "eval_loss", "grad_norm", "learning_rate")
        history = [torch.tensor(line[key]) for line in trainer.state.log_history for key in keys if key in line]
        return history, state_of(model), trainer.predict(dataset()).predictions.tolist()

    assert_same(compute, rtol=1e-4, atol=1e-4)  # Adafactor amplifies rounding


def test_continues_from_a_checkpoint(tmp_path: Path) -> None:
    def compute(base: type[Model]) -> object:
        folder = str(tmp_path / base.__module__)
        shared = {"output_dir": folder, "save_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        for steps in (4, 8):
            model = wrapper_of(base)(Config())
            arguments = transformers.TrainingArguments(**shared, max_steps=steps, learning_rate=0.1)
            trainer = transformers.Trainer(model, arguments, train_dataset=dataset())
            trainer.train(resume_from_checkpoint=steps == 8)
        return state_of(model)

    assert_same(compute)


def test_module_that_returns_a_dict(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self, base: type[Model]) -> None:
            super().__init__()
            self.model = base(V)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits, loss = self.model(input_ids, labels)
            return {"loss": loss, "logits": logits}

    def compute(base: type[Model]) -> object:
        model = Plain(base)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=5, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        transformers.Trainer(model, arguments, train_dataset=dataset()).train()
        return state_of(model)

    assert_same(compute)


def test_saved_and_loaded(tmp_path: Path) -> None:
    def compute(base: type[Model]) -> object:
        kind, folder = wrapper_of(base), tmp_path / base.__module__
        model = kind(Config())
        model.save_pretrained(folder)
        return state_of(model), state_of(kind.from_pretrained(folder)), kind.from_pretrained(folder)(IDX).logits

    assert_same(compute)


def test_resized_embeddings() -> None:
    def compute(base: type[Model]) -> object:
        model = wrapper_of(base)(Config())
        model.resize_token_embeddings(V + 3, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[V:] = 0.5
        output = model(IDX + 3, TARGETS)
        output.loss.backward()
        torch.manual_seed(2)
        table = model.get_input_embeddings()
        return output.loss, output.logits, table.weight.grad, model.model.generate(IDX + 3, 10), table.num_embeddings

    assert_same(compute)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}])
def test_generation_mixin(options: dict[str, Any]) -> None:
    def compute(base: type[Model]) -> object:
        model = wrapper_of(base)(Config()).eval()
        torch.manual_seed(2)
        return model.generate(IDX, max_new_tokens=8, use_cache=False, pad_token_id=0, **options)

    assert_same(compute)
