"""The house: every op has its parts in their places, and every file has a name that says whose it is."""

from __future__ import annotations

import inspect
import re
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._library.simple_registry import singleton as registry

from bigramx import data, functional, reference
from tests import tree
from tests.tree import CSRC, OPS, ROOT, TESTS

SCHEMAS = tree.schema_names()
CONTRACTS = [CSRC / f"{op}{ending}" for op in OPS for ending in (".h", ".cpp")]
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())


def is_composite(name: str) -> bool:
    """Whether an op consists of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bigramx::{name}", "CompositeImplicitAutograd")


def function_of(module: object, op: str, schema: str) -> Callable[..., object] | None:
    """The function of a Python module that is called as the op."""
    found = getattr(module, schema, None) or getattr(module, op, None)
    return found if inspect.isfunction(found) else None


def test_ops_are_those_that_torch_knows() -> None:
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("bigramx::")}
    assert known == {f"bigramx::{name}" for name in SCHEMAS}


@pytest.mark.parametrize("op", OPS)
def test_contract_and_kernels(op: str) -> None:
    header = (CSRC / f"{op}.h").read_text()
    assert (CSRC / f"{op}.cpp").exists()
    assert f" {op}_cpu(" in header
    assert f" {op}_cpu(" in (CSRC / "cpu" / f"{op}.cpp").read_text()
    if "// CPU only: " in header:
        assert f"{op}_cuda" not in header
        return
    assert f" {op}_cuda(" in header
    assert f" {op}_cuda(" in (CSRC / "cuda" / f"{op}.cpp").read_text()
    assert f" launch_{op}(" in (launchers := (CSRC / "cuda" / f"{op}_kernels.h").read_text()) or "launch_" in launchers
    assert "__global__" in (CSRC / "cuda" / f"{op}_kernels.cu").read_text()


@pytest.mark.parametrize("op", OPS)
def test_params_are_one_struct(op: str) -> None:
    name = op.title().replace("_", "").replace("Adamw", "AdamW")
    header = (CSRC / f"{op}.h").read_text()
    assert f"struct {name}Params {{" in header
    for place in ("cpu", "cuda"):
        for path in (CSRC / place).glob(f"{op}*"):
            assert not re.search(r"\w(Job|Jobs)\b", path.read_text()), path


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.name)
def test_contracts_know_no_device_and_touch_no_elements(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"^#if|^#ifdef|^#else", text, re.MULTILINE)
    assert "data_ptr" not in text
    assert not re.findall(r"cuda[A-Z]\w+|cuda::|cpu::|at::parallel_for", text)


def test_one_header_asks_whether_cuda_is_built() -> None:
    assert [path.name for path in SOURCES if "defined(BIGRAMX_CUDA)" in path.read_text()] == ["dispatch.h"]


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_files_are_named_by_their_op(place: str) -> None:
    files = [path for path in (CSRC / place).iterdir() if path.is_file()]
    strangers = [path.name for path in files if not path.name.startswith(tuple(OPS))]
    assert strangers == []
    assert {path.name for path in (CSRC / place).iterdir() if path.is_dir()} == {"base", "sampling"}


def test_the_folders_of_csrc() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == {"base", "sampling", "cpu", "cuda"}
    own = {"bindings.cpp", "tokenizer.h", "tokenizer.cpp"}  # the module, and what is no op
    files = {path.name for path in CSRC.iterdir() if path.is_file()} - own
    assert [name for name in files if not name.startswith(tuple(OPS))] == []


def test_kernels_are_named_so() -> None:
    """The functions that are compiled for each CPU target and called from outside, and those of a GPU."""
    for path in SOURCES:
        text = path.read_text()
        dispatched = re.findall(r"BIGRAMX_DISPATCH_TARGET\((?!\.\.\.)(\w+)", text)
        launched = re.findall(r"__global__ void (?:__launch_bounds__\([^()]*(?:\([^()]*\))?[^()]*\)\s*)?(\w+)\(", text)
        assert text.count("__global__") == len(launched), path
        strangers = [name for name in dispatched + launched if not name.endswith("kernel")]
        assert strangers == [], path


@pytest.mark.parametrize("name", SCHEMAS)
def test_fake(name: str) -> None:
    assert is_composite(name) or registry.find(f"bigramx::{name}").fake_impl.kernel is not None


@pytest.mark.parametrize(
    "name", [name for name in SCHEMAS if is_composite(name) or name == tree.op_of(name).strip("_")]
)
def test_reference_twin(name: str) -> None:
    op = tree.op_of(name)
    twin = function_of(reference, op, name)
    public = function_of(functional, op, name) or function_of(data, op, name)
    assert twin is not None
    assert public is not None
    assert inspect.signature(twin) == inspect.signature(public)


def test_every_public_function_has_a_twin() -> None:
    public = {name: function for name, function in vars(functional).items() if inspect.isfunction(function)}
    for name, function in public.items():
        if function.__module__ == functional.__name__ and not name.startswith("_"):
            assert inspect.signature(function) == inspect.signature(getattr(reference, name)), name


@pytest.mark.parametrize("name", ["fit_", "adamw_", "deferred_adamw_"])
def test_reference_twins_of_ops_in_place(name: str) -> None:
    schema = getattr(torch.ops.bigramx, name).default._schema
    parameters = list(inspect.signature(getattr(reference, name)).parameters)
    assert parameters == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str) -> None:
    tests = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    assert f"opcheck(OPS.{name}.default" in tests
    assert (TESTS / f"test_{tree.op_of(name)}.py").exists()


@pytest.mark.parametrize("op", OPS)
def test_benchmark(op: str) -> None:
    assert (ROOT / "benchmarks" / f"bench_{op}.py").exists()


def test_setup_finds_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = runpy.run_path("setup.py")
    compiled = {Path(path).resolve() for path in found["SOURCES"] + found["CUDA_SOURCES"]}
    assert compiled == {path for path in SOURCES if path.suffix in {".cpp", ".cu"}}
    assert {Path(path).resolve() for path in found["HEADERS"]} == {
        path for path in SOURCES if path.suffix in {".h", ".cuh"}
    }


def structs(path: Path) -> Iterator[str]:
    """The structs and classes that a file defines at namespace scope, by their full names; not those of its own."""
    namespaces: list[str] = []
    for line in path.read_text().splitlines():
        if opened := re.match(r"namespace ?([\w:]*) \{$", line):
            namespaces.append(opened[1])
        elif line.startswith("}  // namespace"):
            namespaces.pop()
        elif (defined := re.match(r"(?:struct|class|enum class) (?:alignas\(\w+\) )?(\w+)\b(?!.*;$)", line)) and all(
            namespaces
        ):
            yield "::".join([*namespaces, defined[1]])
    assert namespaces == [], f"{path}: the ends of its namespaces name them"


def test_no_two_structs_share_a_name() -> None:
    """A second definition would violate the one-definition rule wherever both are linked."""
    defined = Counter(name for path in SOURCES for name in structs(path))
    assert len(defined) > 60
    assert [name for name, count in defined.items() if count > 1] == []


def test_that_check_finds_a_second_struct(tmp_path: Path) -> None:
    path = tmp_path / "twice.h"
    path.write_text(
        "namespace bigramx {\nnamespace {\nstruct Own {\n};\n}  // namespace\nstruct Forward;\n"
        "template <typename T>\nstruct Sums {\n};\nclass Sums : Base {\n};\n}  // namespace bigramx\n"
    )
    assert list(structs(path)) == ["bigramx::Sums", "bigramx::Sums"]


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_each_device_has_a_namespace(place: str) -> None:
    """All but the functions that the contracts declare."""
    for path in (CSRC / place).rglob("*"):
        if path.is_file():
            foreign = [name for name in structs(path) if not name.startswith(f"bigramx::{place}::")]
            assert foreign == [], path
