"""The judge of the fuzzer: makes a call, and says which promises it broke.

A call returns what its twin in bigramx.reference returns, or raises an error of PyTorch's that names an argument. It
writes to nothing but what its schema says, and not at all where it raises; it leaves PyTorch's settings as they were.

Each call begins with the same dispatch keys, whatever PyTorch left of the one before. Within an op on fake tensors it
may fail to print a large tensor; the frame of Tensor.__repr__ then lives as long as the traceback, and in it a guard,
which at its end sets the keys that it found, those within the op: nothing records a gradient any more.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor

from bigramx import _C, functional, reference
from tests.trust.fuzz_cases import CHARACTERS, PRELUDE, Case
from tests.trust.fuzz_tensors import differentiate

# What the twins loop over in Python, and how often at most.
LOOPS, LONGEST_LOOP = ("max_new_tokens", "num_samples", "batch_size"), 1000
_NAMES: dict[str, Any] = {}
exec(PRELUDE, _NAMES)


@dataclass(frozen=True)
class Finding:
    """kind: a few words, the same for the same fault."""

    kind: str
    detail: str = ""


@dataclass
class Verdict:
    """outcome: returned, raised, or invalid where not even the arguments could be made."""

    outcome: str
    is_compared: bool = False
    findings: list[Finding] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- arguments


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<case>", "eval")


def evaluate(expression: str, names: Mapping[str, Any] | None = None) -> Any:
    """The value of an expression of a case."""
    return eval(_compiled(expression), _NAMES, dict(names or {}))


def build(case: Case) -> dict[str, Any]:
    """The arguments, the same each time."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks all devices, which takes longer than a call
    arguments: dict[str, Any] = {}
    for name, expression in case.arguments.items():
        arguments[name] = evaluate(expression, arguments)
    return arguments


def context_of(case: Case) -> contextlib.AbstractContextManager[object]:
    """What the call is made within."""
    context: contextlib.AbstractContextManager[object] = (
        evaluate(case.context) if case.context else contextlib.nullcontext()
    )
    return context


def is_dense(value: object) -> bool:
    """Whether a tensor's elements are in memory of the CPU."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, FakeTensor)
        and value.layout is torch.strided
        and value.is_cpu
        and not value.is_nested
        and not value._is_zerotensor()
    )


def has_fakes(arguments: Mapping[str, Any]) -> bool:
    """Whether some are tensors of shapes and dtypes alone."""
    return any(
        isinstance(value, Tensor) and (isinstance(value, FakeTensor) or value.is_meta) for value in arguments.values()
    )


def is_whole(tensor: Tensor) -> bool:
    """Whether a dense tensor's storage has all of its elements."""
    if tensor.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def takes_minutes(case: Case, arguments: Mapping[str, Any]) -> bool:
    """Whether a call has more tokens than are counted in seconds, by pieces, for which memory suffices."""
    tokens, layout = arguments.get("tokens"), arguments.get("layout", torch.sparse_csr)
    counts_pairs = case.target.op in {"count_bigrams", "PairCounter.update"} and layout == torch.sparse_csr
    return counts_pairs and isinstance(tokens, Tensor) and tokens.numel() > 2**28


def lost(arguments: Mapping[str, Any]) -> list[str]:
    """The dense tensors whose storage does not have all of their elements."""
    return [name for name, value in arguments.items() if is_dense(value) and not is_whole(value)]


# ------------------------------------------------------------------------------------------------------- memory


class Memory:
    """The bytes behind the arguments, to tell which were written."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._tensors = {name: value for name, value in arguments.items() if is_dense(value)}
        self._before = {name: _bytes(tensor).clone() for name, tensor in self._tensors.items()}

    def written(self, allowed: set[str]) -> list[str]:
        """The arguments whose storages have changed elsewhere than in the elements of those allowed."""
        return [name for name, before in self._before.items() if self._has_changed(name, before, allowed)]

    def _has_changed(self, name: str, before: Tensor, allowed: set[str]) -> bool:
        after = _bytes(self._tensors[name])
        if torch.equal(before, after):
            return False
        same_storage = self._tensors[name].untyped_storage().data_ptr()
        changed = before != after
        for other in allowed & self._tensors.keys():
            is_same = self._tensors[other].untyped_storage().data_ptr() == same_storage
            if is_same and is_whole(self._tensors[other]):
                changed[_offsets(self._tensors[other], len(after))] = False
        return bool(changed.any())


def _bytes(tensor: Tensor) -> Tensor:
    """All of its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _offsets(tensor: Tensor, nbytes: int) -> Tensor:
    """The offsets of the bytes of its elements, within its storage."""
    size = tensor.itemsize
    shape, strides = (*tensor.shape, size), (*(stride * size for stride in tensor.stride()), 1)
    return torch.arange(nbytes).as_strided(shape, strides, tensor.storage_offset() * size).reshape(-1)


KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def unwind(error: BaseException | None) -> None:
    """Drops what the frames of an error hold, as its end would do later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def settings() -> dict[str, object]:
    """What a call leaves as it was."""
    return {
        "dispatch keys": (
            str(torch._C._dispatch_tls_local_include_set()),
            str(torch._C._dispatch_tls_local_exclude_set()),
        ),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


# ------------------------------------------------------------------------------------------------------- errors

ERRORS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)  # and no others, nor subclasses
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|Storage size calculation overflowed|size of scratch memory"
)
# PyTorch's own, from before the call reaches an op; pybind11's, whose callers then ask the op for its message; and what
# no single argument is to blame for.
FROM_OUTSIDE = re.compile(
    r"Could not run 'bigramx::|incompatible function arguments|There were no tensor arguments to this function"
    r"|not implemented under torch.compile|convert all Tensors to FakeTensors|Could not infer dtype of"
)
# What the twins raise because of how they compute; the kernels' loss has a dtype of its own under autocast. Besides,
# torch.ops takes an int for a bool and a dtype for an int where PyTorch's own functions raise TypeError.
OF_TWINS = re.compile(
    r"without overflow|result type Complex|does not have a grad_fn|Setting requires_grad=True on inference tensor"
    r"|automatic differentiation|view of a leaf Variable|Could not run 'aten::|can't allocate memory|SparseTensorImpl"
    r"|cannot be saved for backward|not differentiable with respect to argument 'weight'"
    r"|Cannot access accelerator device|expected scalar type \w+ but found|tensor with unallocated storage"
)
# What an argument may be called besides by its name.
OTHER_WORDS = {"tokens": "token", "targets": "target", "text": "character", "probs": "probabilities"}
INTERNAL = re.compile(r"INTERNAL ASSERT|vector::|std::|basic_string|bad_alloc|pybind11|SymIntArrayRef")


def judge_error(
    case: Case, error: BaseException, expected: BaseException | None, *, is_fake: bool
) -> Iterator[Finding]:
    """What is wrong with an error. expected: what the twin raises; is_fake: only shapes and dtypes were computed."""
    message = str(error)
    kind = f"{type(error).__name__}: {message.splitlines()[0] if message else ''}"[:160]
    if isinstance(expected, type(error)) and _bare(case, str(expected)) == _bare(case, message):
        return
    if OUT_OF_MEMORY.search(message) or (is_fake and isinstance(error, DynamicOutputShapeException)):
        return
    if FROM_OUTSIDE.search(message) or "Padding_idx must be within" in message:  # F.embedding's AssertionError
        return
    if type(error) not in ERRORS:
        yield Finding("an error of a type that PyTorch does not raise", kind)
    elif INTERNAL.search(message):
        yield Finding("an internal error", kind)
    elif not is_fake and not _names_argument(case, message):
        yield Finding("an error that names no argument", kind)


def _names_argument(case: Case, message: str) -> bool:
    words = [word for name in case.arguments for word in (name, OTHER_WORDS.get(name, name))]
    return re.search(rf"\b({'|'.join(words)})\b", message, re.IGNORECASE) is not None


def _bare(case: Case, message: str) -> str:
    """A message without the name of the op."""
    return message.removeprefix(f"{case.target.op}: ")


# -------------------------------------------------------------------------------------------------------- twins


def twin(case: Case, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """What plain PyTorch makes of the arguments, or None where nothing is the same."""
    op = case.target.op
    if any(isinstance(value := arguments.get(name), int) and value > LONGEST_LOOP for name in LOOPS):
        return None
    if op in TWINS:
        return lambda: TWINS[op](**arguments)
    found = getattr(reference, op, None)
    return None if found is None else lambda: found(**_for_reference(arguments, found))


def _for_reference(arguments: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of an op as the public function takes them."""
    taken = {name: arguments[name] for name in inspect.signature(function).parameters if name in arguments}
    if isinstance(reduction := taken.get("reduction"), int):
        taken["reduction"] = {0: "none", 1: "mean", 2: "sum"}.get(reduction, "")
        if taken.get("padding_idx") == -1:
            taken["padding_idx"] = None
    if arguments.get("more_stop"):
        taken["stop"] = [*functional._stop_tokens(arguments["stop"]), *arguments["more_stop"]]
    return taken


def _loss_op(**arguments: Any) -> Any:
    function = reference.embedding_cross_entropy_with_logits
    loss, logits = function(**_for_reference(arguments, function))
    dtype = arguments.get("loss_dtype")
    return loss if dtype is None else loss.to(dtype), logits if arguments.get("return_logits") else None


def _loss_forward(**arguments: Any) -> Any:
    if arguments["compute_grad"] and arguments["reduction"] == 0:
        raise NoTwinError
    weight = arguments["weight"] = arguments["weight"].detach().requires_grad_(arguments["compute_grad"])
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        loss, logits = _loss_op(**arguments)
    values = torch.autograd.grad(loss, weight)[0] if arguments["compute_grad"] else None
    return loss.detach(), None if logits is None else logits.detach(), *_parts(values)


def _loss_backward(grad_loss: Tensor, **arguments: Any) -> Any:
    if not grad_loss.isfinite().all():
        raise NoTwinError  # the gradient is not finite either; whether it is NaN depends on the order of operations
    weight = arguments["weight"] = arguments["weight"].detach().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        loss, _logits = _loss_op(**arguments)
    return _parts(torch.autograd.grad(loss, weight, grad_loss.reshape(loss.shape).to(loss.dtype))[0])


def _parts(gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows and values of a gradient, dense or sparse."""
    if gradient is None or not gradient.is_sparse:
        return None, gradient
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def _adamw_step(step: Tensor, **arguments: Any) -> None:
    step.add_(1)
    reference.adamw_(step=step, **arguments)


def _fit(beta2: float, **arguments: Any) -> int:
    # Where a gradient is divided by itself, or by what a negative eps leaves of it, or is 0 but for rounding, as that
    # of a single class is, the rounding error makes a whole step.
    if not beta2 > 0.1 or arguments["eps"] < 0 or arguments["weight"].size(-1) == 1:
        raise NoTwinError
    if arguments["row_steps"] is not None:  # of the op, rows may miss steps; of its twin they do not
        raise NoTwinError
    return reference.fit_(beta2=beta2, **arguments)


def _encode(text: str) -> Tensor:
    return torch.tensor([CHARACTERS.index(character) for character in text], dtype=torch.int64)


def _decode(tokens: Any) -> str:
    tokens = torch.as_tensor(tokens)
    return "".join(CHARACTERS[token] for token in tokens.flatten().tolist()) if tokens.numel() > 0 else ""


def _update(tokens: Tensor, begin: int, end: int) -> None:
    reference.count_bigrams(tokens[begin : end + 1], 300)


def _merge(other: _C.PairCounter) -> None:
    other.num_pairs()


def _rows_without_counts(begin: int, end: int, releases: bool) -> Tensor:
    if not 0 <= begin <= end <= 300:
        raise IndexError(f"begin and end are {begin} and {end}")
    integers = torch.zeros(end - begin + 1, dtype=torch.int64)
    return torch.sparse_csr_tensor(integers, integers[:0], integers[:0], (end - begin, 300), check_invariants=False)


def _of_csr(twin: Callable[..., Any]) -> Callable[..., Any]:
    """The twin of an op that searches rows, where their columns ascend, as they must."""

    def judged(crow_indices: Tensor, col_indices: Tensor, unigram: Tensor, **arguments: Any) -> Any:
        rows = torch.arange(len(unigram)).repeat_interleave(crow_indices.diff())
        if (
            not unigram.sum() > 0
            or len(rows) != len(col_indices)
            or not ((rows * len(unigram) + col_indices).diff() > 0).all()
            or not ((col_indices >= 0) & (col_indices < len(unigram))).all()
        ):
            raise NoTwinError
        return twin(crow_indices=crow_indices, col_indices=col_indices, unigram=unigram, **arguments)

    return judged


TWINS: dict[str, Callable[..., Any]] = {
    "interpolated_bigram": _of_csr(reference.interpolated_bigram),
    "interpolated_bigram_generate": _of_csr(reference.interpolated_bigram_generate),
    "embedding_cross_entropy_forward": _loss_forward,
    "embedding_cross_entropy_backward": _loss_backward,
    "adamw_step": _adamw_step,
    "fit_": _fit,
    "Alphabet.encode": _encode,
    "Alphabet.decode": _decode,
    "PairCounter.update": _update,
    "PairCounter.num_pairs": lambda: 0,
    "PairCounter.num_distinct": lambda: 0,
    "PairCounter.merge": _merge,
    "PairCounter.csr": _rows_without_counts,
    "PairCounter.parts": lambda: (torch.zeros(301, dtype=torch.int64), *torch.zeros(2, 0, dtype=torch.int32)),
    "PairCounter.equals": lambda other: other.num_pairs() == 0,
}


class NoTwinError(Exception):
    """Plain PyTorch has nothing to compare with."""


# ------------------------------------------------------------------------------------------------------ results


@dataclass
class Results:
    """What a call returned, and what it left in its arguments."""

    returned: Any
    arguments: dict[str, Any]
    rng_state: Tensor

    @property
    def is_fake(self) -> bool:
        """Whether only shapes and dtypes were computed."""
        return has_fakes(self.arguments)

    def values(self, written: set[str]) -> dict[str, Any]:
        """By a name of each."""
        values = self.returned if isinstance(self.returned, tuple) else (self.returned,)
        found = {f"result {k}": value for k, value in enumerate(values)}
        found |= {name: self.arguments[name] for name in sorted(written)}
        grads = {name: value.grad for name, value in self.arguments.items() if _is_differentiated(value)}
        found |= {f"the gradient of {name}": grad for name, grad in grads.items()}
        if self.is_fake:
            return found  # nothing is drawn
        found["the default generator"] = self.rng_state
        if isinstance(generator := self.arguments.get("generator"), torch.Generator):
            found["generator"] = generator.get_state()
        return found


def _is_differentiated(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and value.requires_grad and value.grad is not None


def differ(actual: Any, expected: Any, tolerance: float, scale: float = 1.0) -> str:
    """How two values differ, or nothing. scale: of the terms that they are sums of, which may cancel."""
    if expected is None:
        return ""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return "" if type(actual) is type(expected) and actual == expected else f"{actual!r:.80}, not {expected!r:.80}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not is_dense(actual) or not is_dense(expected):
        return ""
    return _difference(actual.detach(), expected.detach(), tolerance if expected.is_floating_point() else 0.0, scale)


def _difference(actual: Tensor, expected: Tensor, tolerance: float, scale: float) -> str:
    if torch.equal(actual, expected):
        return ""
    wide = actual.double().flatten(), expected.double().flatten()
    finite = wide[1].isfinite()
    if finite.any():
        scale = max(scale, float(wide[1][finite].abs().max()))
    close = torch.isclose(*wide, rtol=0, atol=tolerance * scale, equal_nan=True)
    if close.all():
        return "" if tolerance > 0 else "integers that are equal as float64"
    k = int((~close).nonzero()[0])
    return f"{actual.flatten()[k].item()} at {k}, not {expected.flatten()[k].item()}"


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def _tolerance(arguments: Mapping[str, Any]) -> float:
    """That of the narrowest dtype among the arguments."""
    dtypes = [value.dtype for value in arguments.values() if isinstance(value, Tensor)]
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=0.0)


def _scale(arguments: Mapping[str, Any]) -> float:
    """That of the terms of a loss that is no mean: of its class weights."""
    weights = arguments.get("class_weight")
    if not isinstance(weights, Tensor) or not is_dense(weights) or arguments["reduction"] in (1, "mean"):
        return 1.0
    largest: float = max(weights[weights.isfinite()].double().abs().tolist(), default=0.0)
    num_pairs: int = arguments["targets"].numel()
    return max(1.0, num_pairs * largest)


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, in the widest dtype. One that is passed twice stays one."""
    wide = {id(value): _in_float64(value) for value in arguments.values()}
    return {name: wide[id(value)] for name, value in arguments.items()}


def _in_float64(value: Any) -> Any:
    if not is_dense(value) or value.dtype not in TOLERANCES:
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


# ------------------------------------------------------------------------------------------------------ a call


def _ignore(stage: str) -> None:
    pass


def written_by(case: Case) -> set[str]:
    """The arguments that the call may write to."""
    return {parameter.name for parameter in case.target.parameters if parameter.is_written}


def run(case: Case, begin_stage: Callable[[str], None] = _ignore) -> Verdict:
    """Makes the call, and judges it. begin_stage: told what comes next."""
    with torch._C._ForceDispatchKeyGuard(*KEYS):
        return _run(case, begin_stage)


def _run(case: Case, begin_stage: Callable[[str], None]) -> Verdict:
    torch.set_num_threads(1)
    try:
        arguments = build(case)
        function = evaluate(case.target.path)
        context = context_of(case)
    except Exception:
        return Verdict("invalid")
    if takes_minutes(case, arguments):
        return Verdict("invalid")
    if any(isinstance(value, FakeTensor) for value in arguments.values()) and lost(arguments):
        return Verdict("invalid")  # PyTorch's message about the first prints the others, without memory or not
    positional = [arguments[p.name] for p in case.target.parameters if not p.is_keyword]
    keywords = {p.name: arguments[p.name] for p in case.target.parameters if p.is_keyword}
    memory = Memory(arguments)
    torch.set_num_threads(case.num_threads)
    before = settings()
    begin_stage("call")
    try:
        with context:
            returned = function(*positional, **keywords)
            if returned is NotImplemented:  # of what `_C` binds; ops.direct then asks the op
                raise TypeError("incompatible function arguments")
            differentiate(returned)
        outcome: Results | BaseException = Results(returned, arguments, torch.get_rng_state())
    except BaseException as error:
        unwind(error)
        outcome = error
    begin_stage("judgement")
    after = settings()
    if has_fakes(arguments) and not isinstance(outcome, Results):
        after["dispatch keys"] = before["dispatch keys"]  # PyTorch's, not ours
    changed = [Finding(f"changes the {what}") for what, value in after.items() if before[what] != value]
    torch.set_num_threads(1)
    if isinstance(outcome, Results):
        verdict = _judge_returned(case, outcome, begin_stage)
    else:
        verdict = _judge_raised(case, outcome, begin_stage)
    begin_stage("judgement")
    verdict.findings += changed
    # Of fit_, a token out of range ends only its step: those before it are taken, and counted.
    may_write = isinstance(outcome, Results) or (case.target.op == "fit_" and isinstance(outcome, IndexError))
    if names := ", ".join(memory.written(written_by(case) if may_write else set())):
        verdict.findings.append(Finding("raises, but has written" if verdict.outcome == "raised" else "writes", names))
    return verdict


def _judge_raised(case: Case, error: BaseException, begin_stage: Callable[[str], None]) -> Verdict:
    expected = _plain(case, begin_stage)
    verdict = Verdict("raised", isinstance(expected, BaseException))
    arguments = build(case)
    twins_error = expected if isinstance(expected, BaseException) else None
    verdict.findings += judge_error(case, error, twins_error, is_fake=has_fakes(arguments))
    # What generate returns begins with idx, however large.
    is_asked_for = case.target.op == "generate" or any(map(_asks_for_memory, arguments.values()))
    if case.target.op.endswith(("_forward", "_backward")):  # the kernels take memory for each row
        weight = arguments["weight"]
        is_asked_for |= isinstance(weight, Tensor) and weight.dim() > 0 and weight.size(0) > 2**20
    if OUT_OF_MEMORY.search(str(error)) and isinstance(expected, Results) and not is_asked_for:
        verdict.findings.append(Finding("out of memory where plain PyTorch is not", str(error)[:160]))
    return verdict


def _asks_for_memory(argument: object) -> bool:
    """Whether it is a large size, or a view that PyTorch itself makes into a tensor before the call."""
    if isinstance(argument, Tensor):
        return argument.is_conj() or argument.is_neg()
    return type(argument) is int and argument > 2**20


def _judge_returned(case: Case, results: Results, begin_stage: Callable[[str], None]) -> Verdict:
    verdict = Verdict("returned")
    if (names := lost(results.arguments)) and not case.target.op.endswith("_fits"):
        verdict.findings.append(Finding(f"returns although {names[0]} has no memory"))
    expected = _plain(case, begin_stage)
    if isinstance(expected, BaseException):
        if isinstance(expected, TypeError) or OF_TWINS.search(str(expected)) or results.is_fake:
            return verdict
        kind = f"{type(expected).__name__}: {expected}"
        verdict.findings.append(Finding("returns where plain PyTorch raises", kind.splitlines()[0][:160]))
    elif isinstance(expected, Results):
        verdict.is_compared = True
        verdict.findings += _compare(case, results, expected)
    return verdict


def _plain(case: Case, begin_stage: Callable[[str], None], *, wide: bool = False) -> Results | BaseException | None:
    """What plain PyTorch returns or raises; None where that cannot be known."""
    begin_stage("twin")
    arguments = build(case)
    if lost(arguments) or any(isinstance(value, FakeTensor) for value in arguments.values()):
        return None
    if wide:
        arguments = in_float64(arguments)
    function = twin(case, arguments)
    if function is None:
        return None
    try:
        with context_of(case):
            returned = function()
            differentiate(returned)
        return Results(returned, arguments, torch.get_rng_state())
    except (NoTwinError, ArithmeticError):  # Python's arithmetic raises where a tensor's does not
        return None
    except BaseException as error:
        return error


def _compare(case: Case, actual: Results, expected: Results) -> Iterator[Finding]:
    tolerance, scale = _tolerance(actual.arguments), _scale(actual.arguments)
    values, plain_values = actual.values(written_by(case)), expected.values(written_by(case))
    found = {name: differ(values.get(name), value, tolerance, scale) for name, value in plain_values.items()}
    exact: Results | BaseException | None = None
    for name in [name for name, difference in found.items() if difference]:
        if not isinstance(plain_values[name], Tensor) or not plain_values[name].is_floating_point():
            continue
        exact = exact or _plain(case, _ignore, wide=True)
        exact_value = exact.values(written_by(case)).get(name) if isinstance(exact, Results) else None
        if exact_value is not None and differ(
            plain_values[name], exact_value.to(plain_values[name].dtype), tolerance, scale
        ):
            found[name] = ""  # where float64 gives something else, PyTorch itself does not know
    for name, difference in found.items():
        if difference:
            yield Finding(f"{name} is unlike plain PyTorch's", difference)
            return
