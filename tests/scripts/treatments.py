"""What scripts do to a model: each treatment makes one of either class."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

from tests.scripts import Model, V


def seen_by(module: nn.Module) -> list[Tensor]:
    """What the hooks on a module saw, for the tests to compare."""
    seen: list[Tensor] = module.__dict__.setdefault("seen", [])
    return seen


def doubled(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


def doubled_and_saturated(_module: nn.Module, _args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return 2 * output + output.tanh() + len(kwargs)


def hook_removed(table: nn.Embedding) -> None:
    table.register_forward_hook(doubled).remove()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


class Noisy(nn.Module):
    """Each access to the weight draws."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


def parametrized_and_left_so(table: nn.Embedding) -> None:
    parametrize.register_parametrization(table, "weight", Symmetric())
    parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)


def pruned_twice(table: nn.Embedding) -> None:
    prune.random_unstructured(table, "weight", amount=20)
    prune.ln_structured(table, "weight", amount=2, n=2, dim=1)


def pruned_for_good(table: nn.Embedding) -> None:
    prune.custom_from_mask(table, "weight", torch.eye(V))
    prune.remove(table, "weight")


def forward_patched(table: Any) -> None:
    original = table.forward
    table.forward = lambda idx: original(idx) / 2


def forward_bound_anew(table: Any) -> None:
    table.forward = types.MethodType(lambda self, idx: F.embedding(idx, self.weight).softmax(-1), table)


def call_compiled_by_another(table: Any) -> None:
    table._compiled_call_impl = lambda idx: F.embedding(idx, 3 * table.weight)


class Tripled(Tensor):
    """A subclass of Tensor, with its own F.embedding."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return 3 * output.as_subclass(Tensor) if func is F.embedding else output


def set_weight(weight: Callable[[], Tensor]) -> Callable[[Any], None]:
    return lambda table: setattr(table, "weight", nn.Parameter(weight()))


CHANGES_OF_THE_TABLE: dict[str, Callable[[Any], object]] = {
    "forward_hook_that_looks": lambda table: table.register_forward_hook(
        lambda module, _args, output: seen_by(module).append(output.detach())
    ),
    "forward_hook": lambda table: table.register_forward_hook(doubled),
    "forward_hook_with_kwargs": lambda table: table.register_forward_hook(
        doubled_and_saturated, with_kwargs=True, always_call=True, prepend=True
    ),
    "forward_hook_removed": hook_removed,
    "forward_pre_hook": lambda table: table.register_forward_pre_hook(lambda _module, args: (args[0] % 7,)),
    "backward_hook": lambda table: table.register_full_backward_hook(
        lambda module, _grad_input, grad_output: seen_by(module).append(grad_output[0])
    ),
    "backward_pre_hook": lambda table: table.register_full_backward_pre_hook(lambda _module, grads: (3 * grads[0],)),
    "weight_hook": lambda table: table.weight.register_hook(torch.sign),
    "weight_hook_after_accumulation": lambda table: table.weight.register_post_accumulate_grad_hook(
        lambda weight: seen_by(table).append(weight.grad.clone())
    ),
    "pruned": lambda table: prune.l1_unstructured(table, "weight", amount=0.5),
    "pruned_twice": pruned_twice,
    "pruned_for_good": pruned_for_good,
    "parametrized": lambda table: parametrize.register_parametrization(table, "weight", Symmetric()),
    "parametrized_by_noise": lambda table: parametrize.register_parametrization(table, "weight", Noisy()),
    "parametrized_and_left_so": parametrized_and_left_so,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "max_norm_set": lambda table: setattr(table, "max_norm", 1.0),
    "padding_idx_set": lambda table: setattr(table, "padding_idx", 3),
    "padding_idx_from_the_end_set": lambda table: setattr(table, "padding_idx", -1),
    "weight_in_its_dict": lambda table: vars(table).update(weight=torch.randn(V, V, requires_grad=True)),
    "scale_grad_by_freq_set": lambda table: setattr(table, "scale_grad_by_freq", True),
    "forward_patched": forward_patched,
    "forward_bound_anew": forward_bound_anew,
    "class_assigned": lambda table: setattr(table, "__class__", Scaled),
    "compiled_in_place": lambda table: table.compile(backend="eager"),
    "call_compiled_by_another": call_compiled_by_another,
    "transposed_weight": set_weight(lambda: torch.randn(V, V).T),
    "weight_in_larger_storage": set_weight(lambda: torch.randn(2 * V, 2 * V)[3 : V + 3, 4 : V + 4]),
    "weight_of_a_subclass": set_weight(lambda: torch.randn(V, V).as_subclass(Tripled)),
    "weight_data_assigned": lambda table: setattr(table.weight, "data", torch.randn(V, V)),
    "initialised_anew": lambda table: nn.init.xavier_normal_(table.weight),
    "reset": lambda table: table.reset_parameters(),
    "zeroed": lambda table: nn.init.zeros_(table.weight),
}


class Scaled(nn.Embedding):
    """Gemma's, for one."""

    def forward(self, idx: Tensor) -> Tensor:
        return 4 * super().forward(idx)


class OwnCall(nn.Embedding):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args).tanh()


class WeightComputed(nn.Embedding):
    """Its weight is derived, with a draw, at each access."""

    def __init__(self) -> None:
        super().__init__(V, V)
        self.raw = self._parameters.pop("weight")

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and isinstance(raw := self._parameters.get("raw"), Tensor):
            return F.normalize(raw + torch.rand_like(raw), dim=1)
        return super().__getattr__(name)


class WeightAsProperty(nn.Embedding):
    """An equalised learning rate."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        weight: Any = nn.Module.__getattr__(self, "weight")
        return 0.1 * weight


class WeightLookedUp(nn.Embedding):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__("_parameters").get(name)
        return super().__getattribute__(name) if value is None else 0.1 * value


def of_class(table: nn.Module, kind: type[nn.Module]) -> nn.Module:
    table.__class__ = kind
    return table


class ChangesNothing(nn.Embedding):
    pass


class OneHotLinear(nn.Linear):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(F.one_hot(idx, V).float())


class LoRA(nn.Module):
    """An adapter that has nothing of nn.Embedding but what calling it does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Embedding(V, 2), nn.Linear(2, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        output: Tensor = self.base(idx) + self.up(self.down(idx))
        return output


class Wrapper(nn.Module):
    """It has all attributes of what it wraps, and doubles what calling that gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, idx: Tensor) -> Tensor:
        output: Tensor = 2 * self.module(idx)
        return output


def compiled(table: nn.Module) -> Any:
    return torch.compile(table, backend="eager")


TABLES: dict[str, Callable[[Any], nn.Module]] = {
    "max_norm": lambda _table: nn.Embedding(V, V, max_norm=1.0),
    "max_norm_and_norm_type": lambda _table: nn.Embedding(V, V, max_norm=1.5, norm_type=1.0),
    "scale_grad_by_freq": lambda _table: nn.Embedding(V, V, scale_grad_by_freq=True),
    "padding_idx": lambda _table: nn.Embedding(V, V, padding_idx=3),
    "all_options": lambda _table: nn.Embedding(V, V, padding_idx=-2, max_norm=2.0, scale_grad_by_freq=True),
    "float64": lambda _table: nn.Embedding(V, V, dtype=torch.float64),
    "given_weight": lambda _table: nn.Embedding(V, V, _weight=torch.arange(V * V).view(V, V) / 100),
    "more_rows_than_columns": lambda _table: nn.Embedding(V + 3, V),
    "from_pretrained": lambda _table: nn.Embedding.from_pretrained(torch.randn(V, V), freeze=False, padding_idx=0),
    "factored": lambda _table: nn.Sequential(nn.Embedding(V, 3), nn.Linear(3, V)),
    "dropout": lambda table: nn.Sequential(table, nn.Dropout(0.2)),
    "one_hot_linear": lambda _table: OneHotLinear(V, V),
    "adapter": LoRA,
    "scaled": lambda _table: Scaled(V, V),
    "own_call": lambda _table: OwnCall(V, V),
    "weight_computed": lambda _table: WeightComputed(),
    "weight_as_property": lambda table: of_class(table, WeightAsProperty),
    "weight_looked_up": lambda table: of_class(table, WeightLookedUp),
    "subclass_that_changes_nothing": lambda _table: ChangesNothing(V, V),
    "data_parallel": nn.DataParallel,
    "wrapper": Wrapper,
    "compiled": compiled,
}


def factor_as_weight(model: Model) -> None:
    """The weight is computed by a hook, from a parameter of the model."""
    model.factor, table = nn.Parameter(torch.randn(V, 3)), model.token_embedding_table
    del table.weight
    model.register_forward_pre_hook(lambda _model, _args: setattr(table, "weight", model.factor @ model.factor.T))
    table.weight = model.factor.detach()


def table_as_property(model: Model) -> None:
    """What a class makes of the table that is registered."""
    table = property(lambda model: Wrapper(model._modules["token_embedding_table"]))
    model.__class__ = type("Own", (type(model),), {"token_embedding_table": table})


def forward_of_the_model_patched(model: Model) -> None:
    original = model.forward

    def forward(_self: Model, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits, loss = original(idx, targets)
        return 2 * logits, None if loss is None else 3 * loss

    model.forward = types.MethodType(forward, model)


def attributes_assigned(model: Model) -> None:
    """As nanoGPT's scripts and many others do."""
    model.vocab_size, model.device, model.config = V, torch.device("cpu"), {"vocab_size": V}


def thawed(model: Model) -> None:
    model.requires_grad_(False)
    model.requires_grad_(True)


CHANGES_OF_THE_MODEL: dict[str, Callable[[Any], object]] = {
    "untreated": lambda _model: None,
    "hook_on_the_model": lambda model: model.register_forward_hook(
        lambda _model, _args, output: (2 * output[0], None if output[1] is None else output[1] + 1)
    ),
    "pre_hook_on_the_model": lambda model: model.register_forward_pre_hook(
        lambda _model, args, kwargs: (tuple(arg % 7 for arg in args), kwargs), with_kwargs=True
    ),
    "backward_hook_on_the_model": lambda model: model.register_full_backward_hook(
        lambda module, _grad_input, grad_output: seen_by(module).append(grad_output[1])
    ),
    "backward_pre_hook_on_the_model": lambda model: model.register_full_backward_pre_hook(
        lambda _model, grads: tuple(None if grad is None else 3 * grad for grad in grads)
    ),
    "factor_as_weight": factor_as_weight,
    "table_as_property": table_as_property,
    "forward_of_the_model_patched": forward_of_the_model_patched,
    "model_compiled_in_place": lambda model: model.compile(backend="eager"),
    "to_float64": lambda model: model.double(),
    "to_bfloat16": lambda model: model.bfloat16(),
    "to_float16": lambda model: model.half(),
    "evaluation_mode": lambda model: model.eval(),
    "attributes_assigned": attributes_assigned,
    "thawed": thawed,
    "in_a_parameter_list": lambda model: setattr(
        model, "weights", nn.ParameterList([model.token_embedding_table.weight])
    ),
    "in_shared_memory": lambda model: model.share_memory(),
    "state_assigned": lambda model: model.load_state_dict(
        {"token_embedding_table.weight": torch.randn(V, V, dtype=torch.float64)}, assign=True
    ),
}


def deferred(base: type[Model]) -> Model:
    """Made without memory, initialised later."""
    with torch.device("meta"):
        model = base(V)
    model.to_empty(device="cpu")
    model.token_embedding_table.reset_parameters()
    return model


def of_the_default_dtype(base: type[Model]) -> Model:
    torch.set_default_dtype(torch.float64)
    try:
        return base(V)
    finally:
        torch.set_default_dtype(torch.float32)


def saved_and_loaded(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def of_saved_state(base: type[Model]) -> Model:
    model = base(V)
    model.load_state_dict(saved_and_loaded(base(V).state_dict(), weights_only=True))
    return model


WAYS_TO_MAKE_ONE: dict[str, Callable[[type[Model]], Model]] = {
    "deferred": deferred,
    "of_the_default_dtype": of_the_default_dtype,
    "copied": lambda base: copy.deepcopy(base(V)),
    "pickled": lambda base: pickle.loads(pickle.dumps(base(V))),
    "saved_whole": lambda base: saved_and_loaded(base(V), weights_only=False),
    "of_saved_state": of_saved_state,
}


def class_by_logits(base: type[Model], logits_of: Callable[[Model, Tensor], Tensor], **modules: nn.Module) -> Model:
    """A model of a class that has other logits, by a forward with the lecture's signature."""

    class Derived(base):  # type: ignore[misc]
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            logits = logits_of(self, idx)
            if targets is None:
                return logits, None
            logits = logits.view(-1, logits.size(-1))
            return logits, F.cross_entropy(logits, targets.reshape(-1))

    model = Derived(V)
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def masked(base: type[Model]) -> Model:
    def logits_of(model: Model, idx: Tensor) -> Tensor:
        logits: Tensor = base.forward(model, idx)[0]
        return logits.masked_fill(torch.arange(V) % 2 == 0, -1e4)

    return class_by_logits(base, logits_of)


def tied_head(base: type[Model]) -> Model:
    model = class_by_logits(
        base, lambda model, idx: model.head(model.token_embedding_table(idx)), head=nn.Linear(V, V, bias=False)
    )
    model.head.weight = model.token_embedding_table.weight
    return model


def position_table(base: type[Model]) -> Model:
    """The lecture's next step: the logits depend on all that came before."""
    return class_by_logits(
        base,
        lambda model, idx: model.token_embedding_table(idx) + model.position_table(torch.arange(idx.size(1))),
        position_table=nn.Embedding(300, V),
    )


def lecture_signature(base: type[Model]) -> Model:
    class Derived(base):  # type: ignore[misc]
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            return super().forward(idx, targets)

    return Derived(V)


def any_arguments(base: type[Model]) -> Model:
    class Derived(base):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    return Derived(V)


def penalty(base: type[Model]) -> Model:
    class Derived(base):  # type: ignore[misc]
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            logits, loss = super().forward(idx, targets)
            return logits, None if loss is None else loss + 1e-3 * logits.logsumexp(-1).square().mean()

    return Derived(V)


def call_of_the_model(base: type[Model]) -> Model:
    class Derived(base):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            logits, loss = super().__call__(*args, **kwargs)
            return 2 * logits, None if loss is None else 2 * loss

    return Derived(V)


def other_table(base: type[Model]) -> Model:
    class Derived(base):  # type: ignore[misc]
        def __init__(self, vocab_size: int) -> None:
            super().__init__(vocab_size)
            self.token_embedding_table = Scaled(vocab_size, vocab_size)

    return Derived(V)


def own_init(base: type[Model]) -> Model:
    """It makes its own table, and never calls the __init__ of the class that it extends."""

    class Derived(base):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.token_embedding_table = nn.Embedding(V, V)

    return Derived()


CLASSES: dict[str, Callable[[type[Model]], Model]] = {
    "masked": masked,
    "four_times": lambda base: class_by_logits(base, lambda model, idx: 4 * model.token_embedding_table(idx)),
    "extra_head": lambda base: class_by_logits(
        base, lambda model, idx: model.head(model.token_embedding_table(idx)), head=nn.Linear(V, V)
    ),
    "tied_head": tied_head,
    "position_table": position_table,
    "lecture_signature": lecture_signature,
    "any_arguments": any_arguments,
    "penalty": penalty,
    "call_of_the_model": call_of_the_model,
    "other_table": other_table,
    "own_init": own_init,
}


def changed(change: Callable[[Model], object]) -> Callable[[type[Model]], Model]:
    def make(base: type[Model]) -> Model:
        model = base(V)
        change(model)
        return model

    return make


def changed_table(change: Callable[[Any], object]) -> Callable[[type[Model]], Model]:
    return changed(lambda model: change(model.token_embedding_table))


def with_table(make_table: Callable[[Any], nn.Module]) -> Callable[[type[Model]], Model]:
    return changed(lambda model: setattr(model, "token_embedding_table", make_table(model.token_embedding_table)))


def then_copied(make: Callable[[type[Model]], Model]) -> Callable[[type[Model]], Model]:
    return lambda base: copy.deepcopy(make(base))


TREATMENTS: dict[str, Callable[[type[Model]], Model]] = {
    **{name: changed(change) for name, change in CHANGES_OF_THE_MODEL.items()},
    **{name: changed_table(change) for name, change in CHANGES_OF_THE_TABLE.items()},
    **{f"table_{name}": with_table(make) for name, make in TABLES.items()},
    **{f"class_{name}": make for name, make in CLASSES.items()},
    **WAYS_TO_MAKE_ONE,
}
TREATMENTS |= {
    f"{name}_then_copied": then_copied(TREATMENTS[name])
    for name in ("forward_hook", "parametrized", "table_factored", "forward_patched")
}

# Its forward, or what surrounds that, cannot do without logits.
NEEDS_LOGITS = {"hook_on_the_model", "class_call_of_the_model", "forward_of_the_model_patched", "class_penalty"}
# A kernel that accumulates in float32 rounds once.
TOLERANCES = {name: {"rtol": 2e-2, "atol": 2e-2} for name in ("to_bfloat16", "to_float16")}
