"""The short form of make fuzz; and the fuzzer itself, which finds faults that are planted."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library

from bigramx import _C, functional
from tests import processes
from tests.tree import ROOT, schema_names
from tests.trust import fuzz_cases, fuzz_judge, fuzz_ops, fuzz_tensors, fuzz_watch
from tests.trust.fuzz_cases import Case, Draw, of_op, of_target, targets

pytestmark = pytest.mark.cpu_only

CALLS = 1000
PLANTED_CALLS = 40


def run(*arguments: str) -> str:
    """What a program of Python prints; it need not succeed."""
    return processes.run([sys.executable, *arguments], cwd=ROOT).stdout


def test_short_form() -> None:
    printed = run("-m", "tests.trust.fuzz_ops", "250", "--seed", "1", "--calls", str(CALLS))
    assert "findings: none" in printed, printed
    calls, returned, compared = (
        int(re.search(rf"([\d,]+) {what}", printed)[1].replace(",", ""))  # type: ignore[index]
        for what in ("calls", "returned", "compared")
    )
    assert calls > 0.85 * CALLS
    assert returned > 0.4 * calls
    assert compared > 0.6 * calls


# ---------------------------------------------------------------------------------------------- what is called


def test_everything_bound_to_python_is_called() -> None:
    called = {target.path for target in targets()}
    assert {f"torch.ops.bigramx.{name}.default" for name in schema_names()} <= called
    no_ops = {"build_info", "empty_gradient_pool", "gradient_pool_info", "set_gradient_pool_limit"}
    bound = {name for name in dir(_C) if not name.startswith("__")} - no_ops
    assert {re.split(r"[.(]", path)[1] for path in called if path.startswith("_C.")} == bound
    methods = {name for name in dir(_C.Alphabet) if not name.startswith("_")}
    assert {path.rpartition(".")[2] for path in called if "Alphabet(" in path} == methods
    assert {"functional.generate", "functional.adamw_", "data.get_batch", "ops.fit_"} <= called


def only_plain(seed: int, index: int) -> Case:
    """A valid call of each target in turn."""
    draw = Draw(f"{seed}/{index}")
    case = of_target(targets()[index % len(targets())], draw)
    return Case(case.target, case.plain, case.plain)


def test_plain_calls_return(instrument: dict[str, Any]) -> None:
    assert instrument["findings of plain calls"] == []
    outcomes = instrument["outcomes of plain calls"]
    assert outcomes.keys() <= {"returned", "returned and compared"}, outcomes
    assert outcomes["returned and compared"] > 3.5 * len(targets())


def test_a_case_is_made_by_its_number_alone(instrument: dict[str, Any]) -> None:
    assert len(set(programs())) == 40
    assert instrument["programs"] == programs()


def programs() -> list[str]:
    return [fuzz_cases.case(5, index, targets()).program() for index in range(40)]


def test_most_calls_are_nearly_valid() -> None:
    num_odd = [len(fuzz_cases.case(5, index, targets()).odd) for index in range(1000)]
    assert sum(count <= 2 for count in num_odd) > 700
    assert sum(count > 4 for count in num_odd) > 20


def test_a_case_is_a_program() -> None:
    case = next(c for k in range(1000) if (c := fuzz_cases.case(5, k, targets())).target.op == "generate" and not c.odd)
    names = dict(fuzz_judge._NAMES)
    exec(case.program(), names)
    assert names["idx"].dim() == 2


# ------------------------------------------------------------------------------------------------- regressions

# What make fuzz has found: what is called, and its odd arguments; V is 5.
FOUND: list[tuple[str, dict[str, str]]] = [
    *(
        (f"{module}.{name}", {"tokens": f"{lost}(torch.randint(0, 5, (400,)){', 16' if lost == 'shrunk' else ''})"})
        for module in ("ops", "torch.ops.bigramx")
        for name in ("count_bigrams", "get_batch", "fit_")
        for lost in ("freed", "shrunk")
    ),
    ("ops.multinomial", {"probs": "freed(torch.rand(5))"}),
    ("ops.multinomial", {"probs": "shrunk(torch.rand(3, 5), 16)", "sampler": "'philox'"}),
    ("ops.generate", {"weight": "freed(torch.randn(5, 5))"}),
    ("ops.generate", {"idx": "freed(torch.randint(0, 5, (2, 3)))"}),
    ("ops.generate", {"max_new_tokens": "2**63 - 1"}),
    ("ops.generate", {"weight": "huge(torch.randn(5, 5), 2**31, 2**31)"}),
    ("ops.embedding_cross_entropy", {"weight": "freed(torch.randn(5, 5))"}),
    ("ops.embedding_cross_entropy", {"weight": "shrunk(torch.randn(5, 5), 16)"}),
    ("ops.embedding_cross_entropy", {"weight": "huge(torch.randn(5, 5), 2**62, 1)", "targets": "0 * idx"}),
    ("ops.embedding_cross_entropy", {"weight": "freed(torch.randn(5, 5))", "return_logits": "torch.ones(2)"}),
    ("ops.embedding_cross_entropy", {"class_weight": "with_value(torch.rand(5), float('inf'))", "ignore_index": "0"}),
    (
        "torch.ops.bigramx.embedding_cross_entropy_forward.default",
        {"class_weight": "with_value(torch.rand(5), 3e38)", "targets": "0 * idx", "compute_grad": "True"},
    ),
    (
        "torch.ops.bigramx.embedding_cross_entropy_forward.default",
        {"weight": "-3e38 * torch.ones(5, 5)", "z_loss": "0.01"},
    ),
    ("functional.embedding_cross_entropy", {"weight": "with_value(torch.randn(5, 5), 3e38)", "z_loss": "0.01"}),
    ("ops.embedding_cross_entropy", {"weight": "parameter(3e38 * torch.ones(5, 5))", "z_loss": "0.01"}),
    ("torch.ops.bigramx.embedding_cross_entropy_forward.default", {"loss_dtype": "torch.float4_e2m1fn_x2"}),
    ("torch.ops.bigramx.embedding_cross_entropy_forward.default", {"loss_dtype": "torch.float8_e4m3fn"}),
    (
        "torch.ops.bigramx.embedding_cross_entropy_backward.default",
        {
            "grad_loss": "1e-5 * torch.rand(2, 3, dtype=torch.float64)",
            "weight": "torch.randn(5, 5, dtype=torch.float64)",
            "reduction": "0",
            "z_loss": "1.7e308",
        },
    ),
    (
        "torch.ops.bigramx.embedding_cross_entropy_backward.default",
        {"weight": "huge(torch.randn(1, 1), 2**62, 1)", "targets": "0 * idx", "sparse": "True"},
    ),
    ("functional.embedding_cross_entropy", {"weight": "torch.randn(5, 5).sum()", "padding_idx": "0"}),
    ("functional.embedding_cross_entropy", {"reduction": "[1, 2]"}),
    ("functional.embedding_cross_entropy", {"padding_idx": "object()"}),
    ("torch.ops.bigramx.embedding_cross_entropy_forward.default", {"targets": "torch.rand(2, 3, 5).softmax(-1)"}),
    ("torch.ops.bigramx.embedding_cross_entropy_forward.default", {"loss_dtype": "torch.complex64"}),
    ("torch.ops.bigramx.embedding_cross_entropy_backward.default", {"targets": "torch.rand(2, 3, 5).softmax(-1)"}),
    ("torch.ops.bigramx.embedding_cross_entropy_backward.default", {"grad_loss": "torch.ones((), dtype=torch.int64)"}),
    *(
        ("ops.adamw_", {name: f"{odd}(torch.rand(5, 5))"})
        for odd in ("freed", "negated", "imaginary", "inference", "parameter")
        for name in ("param", "grad", "exp_avg", "exp_avg_sq")
    ),
    *(("_C.adamw_step", {name: "torch.rand(5, 5).to_sparse()"}) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
    ("_C.adamw_step", {"param": "zero_tensor(torch.rand(5, 5))"}),
    ("_C.adamw_step", {"step": "inference(torch.tensor(3.0))"}),
    ("ops.adamw_", {"max_exp_avg_sq": "exp_avg_sq"}),
    ("ops.deferred_adamw_", {"row_steps": "torch.arange(5)"}),
    ("ops.deferred_adamw_", {"schedule": "torch.full((3, 5), 1e4, dtype=torch.float64)"}),
    ("ops.deferred_adamw_", {"schedule": "zero_tensor(torch.ones(3, 5, dtype=torch.float64))"}),
    ("ops.deferred_adamw_", {"rows": "torch.tensor([2, 2, 1, 0, 3])"}),
    (
        "functional.interpolated_bigram",
        {"idx": "zero_tensor(torch.zeros(2, 3).long())", "backoff": "torch.full((5,), 0.5, requires_grad=True)"},
    ),
    ("functional.interpolated_bigram_generate", {"idx": "torch.zeros(0, 1, dtype=torch.int32)", "top_p": "1.0"}),
    ("ops.adamw_", {"grad": "param", "exp_avg_sq": "exp_avg"}),
    ("ops.adamw_", {"step": "freed(torch.tensor(3.0))", "maximize": "torch.ones(2)"}),
    ("_C.adamw_fits", {"grad": "freed(torch.rand(5, 5))", "step": "object()"}),
    ("ops.fit_", {"batch_size": "2**61", "block_size": "8"}),
    ("ops.fit_", {"padding_idx": "5"}),
    ("ops.fit_", {"weight": "column_major(torch.randn(5, 5))"}),
    ("ops.fit_", {"weight": "torch.randn(5, 5, dtype=torch.float16)"}),
    ("ops.fit_", {"exp_avg_sq": "exp_avg"}),
    ("ops.fit_", {"exp_avg": "negated(torch.rand(5, 5))"}),
    ("ops.fit_", {"exp_avg_sq": "freed(torch.rand(5, 5))"}),
    ("ops.fit_", {"step": "torch.tensor(-1.0)"}),
    ("ops.fit_", {"tokens": "torch.randint(5, 9, (400,))"}),
    ("_C.Alphabet('abcdefgh').decode_sequence", {"tokens": "5"}),
    ("_C.Alphabet('abcdefgh').decode_sequence", {"tokens": "{1, 2}"}),
    ("_C.Alphabet('abcdefgh').decode", {"tokens": "torch.rand(3)"}),
    ("_C.Alphabet('abcdefgh').decode", {"tokens": "in_dtype(torch.rand(3), torch.uint4)"}),
    ("_C.Alphabet('abcdefgh').decode", {"tokens": "shrunk(torch.randint(0, 8, (9,)), 16)"}),
    ("_C.Alphabet('abcdefgh').decode", {"tokens": "torch.randint(0, 8, (9,)).to('meta')"}),
]


# PyTorch's repr of the large tensor is short of memory, within the op on a fake one; then something is differentiated.
AFTER_ONE_ANOTHER: list[tuple[str, dict[str, str]]] = [
    ("ops.adamw_", {"param": "fake(torch.rand(5, 5))", "exp_avg_sq": "huge(torch.rand(5, 5), 2**32)"}),
    (
        "functional.embedding_cross_entropy",
        {"weight": "parameter(torch.randn(5, 5))", "ignore_index": "__import__('gc').collect() * 0 - 100"},
    ),
]


def found_case(index: int, found: Sequence[tuple[str, dict[str, str]]] = FOUND) -> Case:
    """One of these, with valid arguments besides."""
    path, odd = found[index]
    (target,) = (target for target in targets() if target.path in {path, f"{path}.default"})
    draw = Draw("regression")
    draw.V, draw.B, draw.T, draw.reduction, draw.is_soft, draw.dtype, draw.wide_dtype = (
        5,
        2,
        3,
        1,
        False,
        *["float32"] * 2,
    )
    case = of_target(target, draw)
    return Case(target, {**case.plain, **odd}, case.plain)


def test_a_bool_is_a_bool() -> None:
    """And no object that happens to be true; the message comes without the repr of any tensor."""
    with pytest.raises(TypeError, match="Expected a value of type 'bool' for argument 'replacement'"):
        functional.multinomial(torch.ones(3), 1, "no")  # type: ignore[arg-type]
    assert _C.multinomial(torch.ones(3), 1, "no", None, None) is NotImplemented
    with pytest.raises(TypeError, match=r"^adamw_fits\(\): incompatible function arguments$"):
        _C.adamw_fits(*([torch.ones(3)] * 5), "no")


def test_objects_that_hold_no_tokens() -> None:
    alphabet = _C.Alphabet("abc")
    for tokens in (5, {1, 2}, torch.ones(2), None, "ab"):
        with pytest.raises(TypeError, match="expected tokens to be a list or a tuple, got "):
            alphabet.decode_sequence(tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected tokens to be integers, got Float"):
        alphabet.decode(torch.ones(2))
    assert alphabet.decode(torch._neg_view(torch.tensor([-1, -2]))) == "bc"


def test_a_case_begins_as_if_it_were_the_first(instrument: dict[str, Any]) -> None:
    assert instrument["one after another"] == [{"raised": 1, "returned and compared": 1}, []]


def test_what_was_found_is_mended(instrument: dict[str, Any]) -> None:
    assert instrument["findings of what was found"] == []
    outcomes = instrument["outcomes of what was found"]
    assert sum(outcomes.values()) == len(FOUND), outcomes
    assert outcomes.keys() <= {"returned and compared", "raised", "raised and compared"}, outcomes


# ------------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    "kind", ["guarded", "unaligned", "strided", "column_major", "own", "inference", "fenced", "read_only"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_odd_tensors_have_their_values(kind: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).view(3, 4).to(dtype)
    made = getattr(fuzz_tensors, kind)(tensor)
    assert torch.equal(made.as_subclass(Tensor), tensor)
    assert made.dtype == dtype


def access(address: int) -> str:
    """How this process may access the memory there, such as rw-p."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end, rights = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
        if int(begin, 16) <= address < int(end, 16):
            return rights
    raise AssertionError(address)


def test_a_fence_and_a_read_only_map() -> None:
    fenced, read_only = fuzz_tensors.fenced(torch.ones(10)), fuzz_tensors.read_only(torch.ones(10))
    end = fenced.data_ptr() + fenced.nbytes
    assert (access(end - 1)[:3], access(end)[:3]) == ("rw-", "---")
    assert access(read_only.data_ptr())[:3] == "r--"


def test_odd_tensors_are_odd() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert fuzz_tensors.unaligned(tensor).data_ptr() % 2 == 1
    assert fuzz_tensors.guarded(tensor).storage_offset() > 0
    assert fuzz_tensors.strided(tensor).stride() == (8, 2)
    assert fuzz_tensors.column_major(tensor).stride() == (1, 3)
    assert fuzz_tensors.negated(tensor).is_neg()
    assert fuzz_tensors.imaginary(tensor).is_neg()
    assert torch.equal(fuzz_tensors.imaginary(tensor).resolve_neg(), tensor)
    assert fuzz_tensors.freed(tensor).untyped_storage().nbytes() == 0
    assert fuzz_tensors.huge(tensor, 2**62, 1).shape == (2**62, 1)
    assert torch.equal(fuzz_tensors.huge(tensor, 2**62, 1)[:2], torch.zeros(2, 1))


@pytest.mark.parametrize(("layout", "outcome"), [("torch.sparse_csr", "invalid"), ("torch.strided", "raised")])
def test_more_tokens_than_are_counted_in_seconds(layout: str, outcome: str) -> None:
    (target,) = (target for target in targets() if target.path == "functional.count_bigrams")
    arguments = {"tokens": "huge(torch.tensor([1]), 2**62)", "vocab_size": "5", "layout": layout}
    verdict = fuzz_judge.run(Case(target, arguments, arguments))
    assert (verdict.outcome, verdict.findings) == (outcome, [])


# --------------------------------------------------------------------------------------------- planted faults


def crashes(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens.clone() if batch_size > 0 else ctypes.string_at(0)  # type: ignore[return-value]


def hangs(tokens: Tensor, batch_size: int) -> Tensor:
    while batch_size == -100:
        time.sleep(0.01)
    return tokens.clone()


def reads_beyond_its_argument(tokens: Tensor, batch_size: int) -> Tensor:
    if tokens.is_contiguous() and tokens.numel() > 0:
        ctypes.string_at(tokens.data_ptr() + tokens.nbytes, 1)
    return tokens.clone()


def writes_to_its_argument(tokens: Tensor, batch_size: int) -> Tensor:
    before = tokens.clone()
    tokens.zero_()
    return before


def writes_beside_its_argument(tokens: Tensor, batch_size: int) -> Tensor:
    if tokens.storage_offset() > 0:
        tokens.as_strided((1,), (1,), 0).zero_()
    return tokens.clone()


def writes_before_it_raises(tokens: Tensor, batch_size: int) -> Tensor:
    tokens.zero_()
    raise ValueError(f"expected batch_size to be another than {batch_size}")


def does_not_name_the_argument(tokens: Tensor, batch_size: int) -> Tensor:
    if batch_size > 100:
        raise RuntimeError("too large")
    return tokens.clone()


def raises_another_type(tokens: Tensor, batch_size: int) -> Tensor:
    assert batch_size < 100, "batch_size"
    return tokens.clone()


def returns_something_else(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens + (batch_size < 0)


def accepts_what_is_wrong(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens.clone()


def allocates_too_much(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens.clone() if batch_size > 1 else torch.empty(2**50)


def leaves_grad_mode_off(tokens: Tensor, batch_size: int) -> Tensor:
    torch.set_grad_enabled(batch_size > 0)
    return tokens.clone()


def leaves_autograd_off(tokens: Tensor, batch_size: int) -> Tensor:
    torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU, batch_size <= 0)
    return tokens.clone()


def returns_from_freed_memory(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens.new_zeros(tokens.shape)


def twin(tokens: Tensor, batch_size: int) -> Tensor:
    return tokens.clone()


def strict_twin(tokens: Tensor, batch_size: int) -> Tensor:
    torch.empty(min(batch_size, 1))  # raises for a negative size
    return tokens.clone()


PLANTED: dict[Callable[..., Tensor], str] = {
    crashes: "SIGSEGV",
    hangs: "hangs for more than 1 s",
    reads_beyond_its_argument: "SIGSEGV",
    writes_to_its_argument: "writes",
    writes_beside_its_argument: "writes",
    writes_before_it_raises: "raises, but has written",
    does_not_name_the_argument: "an error that names no argument",
    raises_another_type: "an error of a type that PyTorch does not raise",
    returns_something_else: "result 0 is unlike plain PyTorch's",
    accepts_what_is_wrong: "returns where plain PyTorch raises",
    allocates_too_much: "out of memory where plain PyTorch is not",
    leaves_grad_mode_off: "changes the grad mode",
    leaves_autograd_off: "changes the dispatch keys",
    returns_from_freed_memory: "returns although tokens has no memory",
}


def fuzz_planted() -> dict[str, list[str]]:
    """What the fuzzer finds in each of these."""
    planted = library.Library("planted", "DEF")
    for function in PLANTED:
        is_written = "(a!)" if function is writes_beside_its_argument else ""
        planted.define(f"{function.__name__}(Tensor{is_written} tokens, int batch_size) -> Tensor")
        planted.impl(function.__name__, function, "CPU")
        fuzz_judge.TWINS[function.__name__] = strict_twin if function is accepts_what_is_wrong else twin
    found = {}
    for function in PLANTED:
        case_of = partial(fuzz_cases.case, 1, targets=(of_op(function.__name__, "planted"),))
        tally = fuzz_watch.watch(case_of, PLANTED_CALLS)
        found[function.__name__] = [f"{tally.counts.total()} cases", *fuzz_ops.described(tally, case_of)]
    return found


def use_instrument() -> None:
    """Prints what these tests are about, in a process that may fork: this one has started threads."""
    fuzz_watch.HANG = 1.0
    plain = fuzz_watch.watch(partial(only_plain, 1), 4 * len(targets()))
    found = fuzz_watch.watch(found_case, len(FOUND))
    pair = fuzz_watch.watch(partial(found_case, found=AFTER_ONE_ANOTHER), len(AFTER_ONE_ANOTHER))
    print(
        json.dumps(
            {
                "outcomes of plain calls": plain.counts,
                "findings of plain calls": [
                    (only_plain(1, k).program(), finding.kind) for k, finding in plain.findings
                ],
                "outcomes of what was found": found.counts,
                "findings of what was found": [
                    (found_case(k).program(), finding.kind) for k, finding in found.findings
                ],
                "one after another": (pair.counts, [finding.detail for _, finding in pair.findings]),
                "programs": programs(),
                "planted": fuzz_planted(),
            }
        )
    )


@pytest.fixture(scope="module")
def instrument() -> Any:
    return json.loads(run("-c", f"import {__name__} as tests; tests.use_instrument()"))


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(instrument: dict[str, Any], fault: Callable[..., Tensor]) -> None:
    found = instrument["planted"][fault.__name__]
    assert any(f"planted.{fault.__name__}.default: {PLANTED[fault]}: " in finding for finding in found), found


def test_a_finding_is_shrunk(instrument: dict[str, Any]) -> None:
    """The only odd argument left is the one that matters."""
    (finding,) = (text for text in instrument["planted"]["does_not_name_the_argument"] if "too large" in text)
    assert re.search(r"\n    tokens = torch\.randint\([^()]*\([^()]*\)[^()]*\)\n", finding), finding


def test_a_child_that_dies_is_replaced(instrument: dict[str, Any]) -> None:
    """Each case is run once."""
    assert instrument["planted"]["crashes"][0] == f"{PLANTED_CALLS} cases"


def test_kinds_of_errors() -> None:
    case = fuzz_cases.case(
        5, next(k for k in range(99) if fuzz_cases.case(5, k, targets()).target.op == "generate"), targets()
    )

    def kinds(error: BaseException, expected: BaseException | None = None) -> list[str]:
        return [finding.kind for finding in fuzz_judge.judge_error(case, error, expected, is_fake=False)]

    assert kinds(ValueError("expected top_k >= 1")) == []
    assert kinds(ValueError("expected k >= 1")) == ["an error that names no argument"]
    assert kinds(ValueError("expected k >= 1"), ValueError("expected k >= 1")) == []
    assert kinds(ValueError("expected k >= 1"), IndexError("expected k >= 1")) == ["an error that names no argument"]
    assert kinds(AssertionError("top_k")) == ["an error of a type that PyTorch does not raise"]
    assert kinds(RuntimeError("top_k: vector::reserve")) == ["an internal error"]
    assert kinds(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == []
