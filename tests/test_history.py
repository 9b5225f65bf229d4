"""The history of a run, and its file."""

from __future__ import annotations

import io
import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from bigramx import BigramLanguageModel, History, fit, storage

TOKENS = torch.randint(20, (500,), generator=torch.Generator().manual_seed(1))

OPTIMIZERS: dict[str, Callable[..., Optimizer] | None] = {
    "default": None,
    "SGD": partial(torch.optim.SGD, lr=1.0),
    "momentum": partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, amsgrad=True),
    "tensors": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), betas=(0.5, 0.75)),
    "NumPy": lambda params: torch.optim.Adam(params, lr=numpy.float32(0.5), eps=numpy.float64(1e-3)),  # type: ignore
    "groups": lambda params: torch.optim.AdamW([{"params": params, "lr": 1, "name": "table"}]),
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.1, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "RAdam": torch.optim.RAdam,
    "Adafactor": torch.optim.Adafactor,
}
SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "OneCycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20),
    "Cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "Restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "Lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "Callable": lambda optimizer: lr_scheduler.LambdaLR(optimizer, Decay()),
    "MultiStep": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 9, 9]),
    "Cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=3, cycle_momentum=False),
    "Plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "Chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "Sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 9)], milestones=[4]
    ),
}


class Decay:
    """A schedule with a state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _step: int) -> float:
        self.calls += 1
        return 0.9**self.calls


def new_model(**options: Any) -> BigramLanguageModel:
    torch.manual_seed(5)
    return BigramLanguageModel(20, **options)


def resumed_through_a_file(model: BigramLanguageModel, path: Path, split_at: int, **options: Any) -> History:
    """A run of 20 steps in two parts; the file gives back what was saved."""
    part = fit(model, TOKENS, max_steps=split_at, generator=torch.Generator().manual_seed(1), **options)
    part.save(path)
    loaded = History.load(path)
    assert vars(loaded).keys() == vars(part).keys()
    for name, value in vars(part).items():
        assert_same(getattr(loaded, name), value)
    return fit(model, TOKENS, max_steps=20, generator=torch.Generator(), resume=loaded, **options)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal, and of the same type and dtype throughout."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert actual.layout == expected.layout
        torch.testing.assert_close(actual.to_dense(), expected.to_dense(), rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert type(actual) is type(expected)
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    elif expected != expected:
        assert actual != actual
    else:
        assert actual == expected
        assert type(actual) is type(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_continues_from_its_file(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"optimizer": OPTIMIZERS[name], "eval_interval": 100}
    whole_model, model = new_model(dtype=dtype), new_model(dtype=dtype)
    whole = fit(whole_model, TOKENS, max_steps=20, generator=torch.Generator().manual_seed(1), **options)
    resumed = resumed_through_a_file(model, tmp_path / "history", 7, **options)
    assert resumed.losses == whole.losses
    assert_same(resumed.optimizer_state, whole.optimizer_state)
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


@pytest.mark.parametrize("name", ["default", "SGD", "momentum", "Adagrad"])
def test_any_optimizer_of_a_sparse_table(tmp_path: Path, name: str) -> None:
    momentum = partial(torch.optim.SGD, lr=1.0, momentum=0.9)  # Nesterov's takes dense gradients alone
    options: dict[str, Any] = {"optimizer": momentum if name == "momentum" else OPTIMIZERS[name]}
    whole_model, model = new_model(sparse=True), new_model(sparse=True)
    whole = fit(whole_model, TOKENS, max_steps=20, generator=torch.Generator().manual_seed(1), **options)
    resumed = resumed_through_a_file(model, tmp_path / "history", 7, **options)
    assert resumed.losses == whole.losses
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


@pytest.mark.parametrize("split_at", [0, 4, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step.*:UserWarning")  # SequentialLR's own
def test_any_scheduler_continues_from_its_file(tmp_path: Path, name: str, split_at: int) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    options: dict[str, Any] = {"optimizer": optimizer, "scheduler": SCHEDULERS[name]}
    whole_model, model = new_model(), new_model()
    whole = fit(whole_model, TOKENS, max_steps=20, generator=torch.Generator().manual_seed(1), **options)
    resumed = resumed_through_a_file(model, tmp_path / "history", split_at, **options)
    assert resumed.losses == whole.losses
    assert_same(resumed.optimizer_state, whole.optimizer_state)
    assert_same(resumed.scheduler_state, whole.scheduler_state)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, (2.5, "b"), {}], ("c", 0): {3: True}, None: math.inf, "": -0.0, "tensor": {"tuple": [math.nan]}},
        Counter({3: 2, 5: 1}),
        OrderedDict(b=1, a=2),
        (10**30, [()], numpy.float32(0.1), numpy.int64(2), numpy.bool_(True), numpy.float16(0.1)),
        [torch.arange(3), torch.tensor(True), torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16).t()],
        torch.tensor([[0, 0], [0, 2.0]]).to_sparse(),
        torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True),
    ],
    ids=repr,
)
def test_states_come_back_as_they_were(tmp_path: Path, value: Any) -> None:
    History(optimizer_state={"value": value}).save(tmp_path / "history")
    loaded = (History.load(tmp_path / "history").optimizer_state or {})["value"]
    assert_same(loaded, value)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    state = {"a": tensor, "a.b": tensor[:3], "a_": tensor.view(2, 3), "b": {"a": tensor}, "c": [tensor.expand(2, 6)]}
    History(optimizer_state=state, scheduler_state={"a": tensor}).save(tmp_path / "history")
    loaded = History.load(tmp_path / "history")
    assert_same(loaded.optimizer_state, state)
    assert_same(loaded.scheduler_state, {"a": tensor})


def test_losses_of_any_value_and_as_many_as_there_are(tmp_path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, 0.1] * 5000
    History(losses=values, steps=list(range(20000)), train_losses=values, optimum=math.inf).save(tmp_path / "history")
    loaded = History.load(tmp_path / "history")
    assert_same(loaded.losses, values)
    assert_same(loaded.train_losses, values)
    assert loaded.steps == list(range(20000))
    assert loaded.optimum == math.inf
    _tensors, header = storage.read_tensors(tmp_path / "history", "history")
    assert len(str(header)) < 2000  # of which a file takes no more than 100 MB


class Unsaveable(torch.optim.SGD):
    """An optimizer that keeps what no file can hold: from the beginning, or from its first step."""

    def __init__(self, params: Any, value: object, at_once: bool) -> None:
        super().__init__(params, lr=0.1)
        self.value = value
        if at_once:
            self.param_groups[0]["extra"] = value

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            self.state[param]["extra"] = self.value
        return super().step(closure)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (math.sqrt, "builtins.builtin_function_or_method"),
        ({1, 2}, "builtins.set"),
        (defaultdict(int), "collections.defaultdict"),
        (numpy.zeros(2), "numpy.ndarray"),
        (1j, "builtins.complex"),
        (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(2, dtype=torch.uint16), "torch.uint16"),
        (torch.ones(2, 2).to_mkldnn(), "torch._mkldnn"),
        (torch.ones(2, device="meta"), "device 'meta'"),
        (torch.nn.UninitializedParameter(), "UninitializedParameter"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_what_cannot_be_saved_is_said_before_the_run_or_after_its_first_step(
    value: object, named: str, at_once: bool
) -> None:
    model = new_model()
    with pytest.raises(TypeError, match=rf"optimizer_state.*extra: expected what a history can save.*{named}"):
        fit(model, TOKENS, max_steps=20, optimizer=lambda params: Unsaveable(params, value, at_once))
    assert torch.equal(model.token_embedding_table.weight, new_model().token_embedding_table.weight) is at_once


def test_a_schedulers_state_that_cannot_be_saved() -> None:
    class Stateful(lr_scheduler.ConstantLR):
        def __init__(self, optimizer: Optimizer) -> None:
            self.function = math.sqrt
            super().__init__(optimizer)

    with pytest.raises(TypeError, match=r"scheduler_state\.function: expected what a history can save"):
        fit(new_model(), TOKENS, max_steps=20, scheduler=Stateful)


@pytest.mark.parametrize("sparse", [False, True])
def test_files_of_version_0_1_continue(tmp_path: Path, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    whole_model, model = new_model(sparse=sparse), new_model(sparse=sparse)
    whole = fit(whole_model, TOKENS, max_steps=20, generator=torch.Generator().manual_seed(1))
    part = fit(model, TOKENS, max_steps=7, generator=generator)
    assert part.optimizer_state is not None
    assert part.generator_state is not None
    tensors = {"losses": torch.tensor(part.losses, dtype=torch.float64), "generator_state": part.generator_state}
    numbers: dict[str, object] = {}
    for name, value in part.optimizer_state["state"][0].items():
        (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.0.{name}"] = value
    names = ("steps", "train_losses", "val_losses", "optimum", "interrupted", "table_checksum")
    values = {name: getattr(part, name) for name in names}
    values |= {"param_groups": part.optimizer_state["param_groups"], "numbers": numbers}
    storage.write_tensors(tmp_path / "history", "history", tensors, {"history": json.dumps(values)})

    loaded = History.load(tmp_path / "history")
    assert loaded.steps == part.steps
    assert_same(loaded.optimizer_state, part.optimizer_state)
    assert fit(model, TOKENS, max_steps=20, generator=generator, resume=loaded).losses == whole.losses
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


def test_a_file_of_version_0_1_without_an_optimizer(tmp_path: Path) -> None:
    values = {"steps": [0], "train_losses": [1.5], "val_losses": [], "param_groups": None, "numbers": {}}
    tensors = {"losses": torch.zeros(0, dtype=torch.float64)}
    storage.write_tensors(tmp_path / "history", "history", tensors, {"history": json.dumps(values)})
    assert History.load(tmp_path / "history").train_losses == [1.5]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"history": "[]"},
        {"history": "{"},
        {"history": '{"optimizer_state": {"tensor": "missing"}, "scheduler_state": null}'},
        {"history": '{"optimizer_state": {"unknown": 1}, "scheduler_state": null}'},
        {"history": '{"optimizer_state": {"sparse_coo": [{"tensor": "steps"}, {"tensor": "losses"}, [1], true]}}'},
        {"history": '{"optimizer_state": {"sparse_coo": [1, 2, [1], true]}, "scheduler_state": null}'},
        {"history": '{"optimizer_state": null, "scheduler_state": null, "later": 1}'},
    ],
    ids=repr,
)
def test_files_of_another_version(tmp_path: Path, content: dict[str, str]) -> None:
    names = ("losses", "train_losses", "val_losses", "steps")
    storage.write_tensors(tmp_path / "history", "history", {name: torch.full((2,), 9) for name in names}, content)
    with pytest.raises(ValueError, match="history: a history of another version of bigramx"):
        History.load(tmp_path / "history")


HOSTILE = (
    "[]", "{}", "null", "true", "-1", "1e999", '"x"', "[[]]", "[1]", "[null]", '"\\ud800"', '{"a": 1, "b": 2}',
    '{"tensor": "x"}', '{"tensor": []}', '{"tuple": 5}', '{"dict": [[{"dict": []}, 1]]}', '{"dict": [1]}',
    '{"numpy": ["O", 1]}', '{"numpy": ["int8", 999]}', '{"numpy": [[], "x"]}', '{"sparse_coo": [1]}',
    '{"sparse_coo": [{"tensor": "losses"}, {"tensor": "losses"}, [4611686018427387904, 2], true]}',
    "1" + "0" * 4000, "9" * 5000, "[" * 100_000, '{"tuple":' * 100_000, "NaN", "{",
)  # fmt: skip


def error_of(call: Callable[[], Any]) -> tuple[Exception | None, Any]:
    """The error of a call, or its value."""
    try:
        return None, call()
    except Exception as error:
        return error, None


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> io.BytesIO:
    file = io.BytesIO()
    storage.write_tensors(file, "history", tensors, metadata)
    file.seek(0)
    return file


def test_hostile_values_are_refused_or_harmless() -> None:
    """In the place of each value; the checksums are right."""
    part = fit(new_model(), TOKENS, TOKENS, max_steps=3)
    tensors, metadata = part.parts()
    values = json.loads(metadata["history"])
    refused = 0
    for hostile in HOSTILE:
        for name in values:
            content = json.dumps(values | {name: "here"}).replace('"here"', hostile)
            error, loaded = error_of(partial(History.load, file_of(tensors, {"history": content})))
            if error is not None:
                refused += 1
                assert type(error) is ValueError  # and none of those that are made of it
                assert str(error).isprintable()
            else:
                repr(loaded)
                loaded.save(io.BytesIO())
        with pytest.raises(ValueError, match="a history of another version"):
            History.load(file_of(tensors, {"history": hostile}))
    assert refused > 0.8 * len(HOSTILE) * len(values)


@pytest.mark.parametrize("name", ["losses", "steps", "train_losses", "val_losses", "generator_state"])
def test_hostile_tensors_are_refused(name: str) -> None:
    tensors, metadata = fit(new_model(), TOKENS, TOKENS, max_steps=3).parts()
    for hostile in (torch.zeros(2, 2), torch.zeros(()), torch.zeros(2, dtype=torch.bool), torch.zeros(3).bfloat16()):
        with pytest.raises(ValueError, match="a history of another version"):
            History.load(file_of({**tensors, name: hostile}, metadata))


def test_a_history_in_its_models_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, whole_model = new_model(), new_model()
    part = fit(model, TOKENS, max_steps=7, generator=torch.Generator().manual_seed(1))
    model.save(path, history=part)
    loaded, history = BigramLanguageModel.load(path), History.load(path)
    assert vars(loaded).keys() == vars(model).keys()
    assert torch.equal(loaded.token_embedding_table.weight, model.token_embedding_table.weight)
    for name, value in vars(part).items():
        assert_same(getattr(history, name), value)
    whole = fit(whole_model, TOKENS, max_steps=20, generator=torch.Generator().manual_seed(1))
    assert fit(loaded, TOKENS, max_steps=20, generator=torch.Generator(), resume=history).losses == whole.losses
    assert torch.equal(loaded.token_embedding_table.weight, whole_model.token_embedding_table.weight)
    content = path.read_bytes()
    for read in (BigramLanguageModel.load, History.load):  # each checks all of the file
        for position in range(0, len(content), 53):
            damaged = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
            with pytest.raises(ValueError, match="BytesIO: "):
                read(io.BytesIO(damaged))
    file = io.BytesIO()
    model.save(file, history=history)
    assert len(file.getvalue()) == len(content)


def test_a_callback_saves_model_and_history_at_once(tmp_path: Path) -> None:
    model = new_model()

    def save(history: History) -> bool:
        model.save(tmp_path / "checkpoint", history=history)
        return history.step == 7

    fit(model, TOKENS, max_steps=20, eval_interval=7, generator=torch.Generator().manual_seed(1), on_progress=save)
    loaded, history = BigramLanguageModel.load(tmp_path / "checkpoint"), History.load(tmp_path / "checkpoint")
    whole_model = new_model()
    whole = fit(whole_model, TOKENS, max_steps=20, eval_interval=7, generator=torch.Generator().manual_seed(1))
    resumed = fit(loaded, TOKENS, max_steps=20, eval_interval=7, generator=torch.Generator(), resume=history)
    assert resumed.losses == whole.losses
    assert torch.equal(loaded.token_embedding_table.weight, whole_model.token_embedding_table.weight)


def test_files_of_another_kind(tmp_path: Path) -> None:
    BigramLanguageModel(2).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a history"):
        History.load(tmp_path / "model.safetensors")


def test_file_objects() -> None:
    file = io.BytesIO()
    part = fit(new_model(), TOKENS, max_steps=7)
    part.save(file)
    file.seek(0)
    loaded = History.load(file)
    assert_same(loaded.optimizer_state, part.optimizer_state)
    with pytest.raises(ValueError, match="BytesIO: damaged, cut short, or no safetensors file"):
        History.load(io.BytesIO(b"no history"))
    file = io.BytesIO()
    storage.write_tensors(file, "history", {}, {"history": "{}"})
    file.seek(0)
    with pytest.raises(ValueError, match="BytesIO: a history of another version"):
        History.load(file)


def test_repr_is_one_short_line() -> None:
    assert repr(History()) == "History(step=0, optimum=nan, interrupted=False, stopped=False)"
    history = fit(new_model(), TOKENS, TOKENS, max_steps=2000)
    assert repr(history) == str(history) == f"{history!r}"
    assert len(repr(history)) < 200
    assert "\n" not in repr(history)
    for value in (history.losses[-1], history.train_losses[-1], history.val_losses[-1], history.optimum):
        assert f"={value:.4f}" in repr(history)
    assert repr(history).startswith("History(step=2000, loss=")
