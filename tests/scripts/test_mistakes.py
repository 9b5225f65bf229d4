"""Mistakes raise what they raise with the lecture's class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

import bigramx
from bigramx import reference
from tests.scripts import IDX, TARGETS, Model, V, loss_of

pytestmark = pytest.mark.cpu_only


def call_with_table(base: type[Model], table: nn.Module | None) -> Model:
    model = base(V)
    model.token_embedding_table = table
    loss_of(model).backward()


def no_table(base: type[Model]) -> None:
    model = base(V)
    del model.token_embedding_table
    loss_of(model)


def weight_of_one_dimension(base: type[Model]) -> None:
    model = base(V)
    model.token_embedding_table.weight = nn.Parameter(torch.randn(V))
    loss_of(model)


def backward_twice(base: type[Model]) -> None:
    loss = loss_of(base(V))
    loss.backward()
    loss.backward()


def weight_of_a_product_changed(base: type[Model]) -> None:
    model = base(V)
    product = (loss_of(model) * model.token_embedding_table.weight).sum()
    with torch.no_grad():
        model.token_embedding_table.weight += 1
    product.backward()


def hook_that_raises(base: type[Model]) -> None:
    model = base(V)
    model.token_embedding_table.register_forward_hook(lambda *_: 1 // 0)
    loss_of(model)


MISTAKES: dict[str, Callable[[type[Model]], object]] = {
    "module_list": lambda base: call_with_table(base, nn.ModuleList([nn.Embedding(V, V)])),
    "none": lambda base: call_with_table(base, None),
    "frozen": lambda base: call_with_table(base, nn.Embedding.from_pretrained(torch.randn(V, V))),
    "too_few_rows": lambda base: call_with_table(base, nn.Embedding(3, V)),
    "too_few_columns": lambda base: call_with_table(base, nn.Embedding(V, 3)),
    "tensor_as_table": lambda base: setattr(base(V), "token_embedding_table", torch.randn(V, V)),
    "no_table": no_table,
    "weight_of_one_dimension": weight_of_one_dimension,
    "backward_twice": backward_twice,
    "weight_of_a_product_changed": weight_of_a_product_changed,
    "hook_that_raises": hook_that_raises,
    "on_meta": lambda base: loss_of(base(V).to("meta")),
    "unknown_key": lambda base: base(V).load_state_dict({"weight": torch.randn(V, V)}),
    "state_of_another_size": lambda base: base(V).load_state_dict(base(V + 1).state_dict()),
    "tokens_as_floats": lambda base: base(V)(IDX.float(), TARGETS),
    "no_tokens": lambda base: base(V)(),
    "unknown_argument": lambda base: base(V)(IDX, labels=TARGETS),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 (the type is what is compared)
        MISTAKES[name](reference.BigramLanguageModel)
    with pytest.raises(expected.type):
        MISTAKES[name](bigramx.BigramLanguageModel)


def test_embedding_bag() -> None:
    """The lecture's class misses a dimension of the logits, whose shape it unpacks; ours finds too few of them."""
    for base in (reference.BigramLanguageModel, bigramx.BigramLanguageModel):
        with pytest.raises((ValueError, RuntimeError), match=r"not enough values to unpack|to match target batch_size"):
            call_with_table(base, nn.EmbeddingBag(V, V))
