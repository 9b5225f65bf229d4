"""The grammar of the fuzzer: calls of everything that is bound to Python, most of whose arguments are valid.

A case is program text, made from (seed, index) alone: an expression for each argument, and beside it a plain valid one.
What there is to call, and with which arguments, is read from schemas, signatures and the stub of `_C`. An argument is
made plain by its name (PLAIN), and odd by its type.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

import bigramx
from bigramx import _C, data, functional

PRELUDE = """import torch
import bigramx
from bigramx import _C, data, functional, ops
from tests.trust.fuzz_tensors import *
"""


@dataclass(frozen=True)
class Parameter:
    """kind: Tensor, int, float, bool, str, list, Generator or dtype."""

    name: str
    kind: str
    is_optional: bool = False
    is_written: bool = False
    is_keyword: bool = False


@dataclass(frozen=True)
class Target:
    """Something to call: an expression, the name of the op that it is, and its parameters."""

    path: str
    op: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Case:
    """A call. The arguments are expressions; `plain` has a valid one for each."""

    target: Target
    arguments: dict[str, str]
    plain: dict[str, str]
    context: str = ""
    num_threads: int = 1
    seed: str = field(default="", compare=False)

    @property
    def odd(self) -> list[str]:
        """The arguments that are not plain."""
        return [name for name in self.arguments if self.arguments[name] != self.plain[name]]

    def with_plain(self, name: str) -> Case:
        """The case with one argument made plain."""
        return replace(self, arguments={**self.arguments, name: self.plain[name]})

    def program(self) -> str:
        """A few lines of Python that make the call."""
        lines = ["torch.manual_seed(0)"]
        passed = []
        for parameter in self.target.parameters:
            argument = self.arguments[parameter.name]
            if parameter.kind == "Tensor" and "(" in argument:
                lines.append(f"{parameter.name} = {argument}")
                argument = parameter.name
            passed.append(f"{parameter.name}={argument}" if parameter.is_keyword else argument)
        call = f"{self.target.path}({', '.join(passed)})"
        if any(word in " ".join(lines) for word in ("requires_grad", "parameter(", "computed(")):
            call = f"differentiate({call})"
        if self.num_threads > 1:
            lines.insert(0, f"torch.set_num_threads({self.num_threads})")
        return "\n".join([*lines, f"with {self.context}:\n    {call}" if self.context else call])


# ------------------------------------------------------------------------------------------------------ targets


def op_names(library: str = "bigramx") -> list[str]:
    """The ops that the dispatcher knows."""
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    return sorted(name for namespace, _, name in names if namespace == library)


def of_op(name: str, library: str = "bigramx") -> Target:
    """An op through the dispatcher."""
    parameters = []
    for argument in getattr(getattr(torch.ops, library), name).default._schema.arguments:
        kind, is_optional = re.subn(r"Optional\[(\w+)\]", r"\1", str(argument.type))
        if argument.name.endswith("dtype"):
            kind = "dtype"  # an int to the schema
        kind = {"List[int]": "list"}.get(kind, kind)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        parameters.append(Parameter(argument.name, kind, bool(is_optional), is_written))
    return Target(f"torch.ops.{library}.{name}.default", name, tuple(parameters))


def of_function(path: str, function: Callable[..., object]) -> Target:
    """A public function, which writes what the op of the same name writes."""
    name = function.__name__
    written = {p.name for p in of_op(name).parameters if p.is_written} if name in op_names() else set()
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = str(parameter.annotation)
        kind = annotation.partition(" | ")[0].rpartition(".")[2]
        kind = {"Reduction": "str", "Sampler": "str"}.get(kind, kind)
        is_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        parameters.append(Parameter(parameter.name, kind, "None" in annotation, parameter.name in written, is_keyword))
    return Target(path, name, tuple(parameters))


def of_module() -> Iterator[Target]:
    """What `_C` binds; build_info takes no arguments."""
    steps = of_op("adamw_").parameters
    counted = tuple(replace(p, is_written=True) if p.name == "step" else p for p in steps)
    yield Target("_C.adamw_step", "adamw_step", counted)
    yield Target("_C.adamw_fits", "adamw_fits", tuple(replace(p, is_written=False) for p in steps[:6]))
    for name in op_names():
        if hasattr(_C, name):
            yield replace(of_op(name), path=f"_C.{name}")
            yield replace(of_op(name), path=f"ops.{name}")
    for definition in ast.walk(ast.parse(Path(bigramx.__file__).with_name("_C.pyi").read_text())):
        if not isinstance(definition, ast.ClassDef):
            continue
        for method in definition.body:
            assert isinstance(method, ast.FunctionDef)
            is_init = method.name == "__init__"
            path = (
                f"_C.{definition.name}"
                if is_init
                else f"_C.{definition.name}({MADE_OF[definition.name]}).{method.name}"
            )
            kinds = [(a.arg, ast.unparse(a.annotation)) for a in method.args.args[1:] if a.annotation]
            parameters = [
                Parameter(name, "list" if "list" in kind else kind.partition(" | ")[0], kind.endswith("| None"))
                for name, kind in kinds
            ]
            yield Target(path, f"{definition.name}.{method.name}", tuple(parameters))


def of_package() -> Iterator[Target]:
    """The public functions that wrap these."""
    for name, function in vars(functional).items():
        if inspect.isfunction(function) and function.__module__ == functional.__name__ and not name.startswith("_"):
            yield of_function(f"functional.{name}", function)
    yield of_function("data.get_batch", data.get_batch)
    tokenizer = bigramx.CharTokenizer.from_text(CHARACTERS)
    for method in (tokenizer.encode, tokenizer.decode):
        path = f"bigramx.CharTokenizer.from_text({CHARACTERS!r}).{method.__name__}"
        yield replace(of_function(path, method), op=f"Alphabet.{method.__name__}")


@cache
def targets() -> tuple[Target, ...]:
    """All that is fuzzed."""
    return (*map(of_op, op_names()), *of_module(), *of_package())


# ---------------------------------------------------------------------------------------------- plain arguments

CHARACTERS = "abcdefgh"
MADE_OF = {"Alphabet": repr(CHARACTERS), "PairCounter": "300, None"}  # the arguments of the bound classes


class Draw(random.Random):
    """The choices of a case, and the sizes that its plain arguments agree on."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.V = self.choice([1, 2, 3, 5, 5, 5, 7, 7, 17, 40, 40, 300])
        self.B, self.T = self.choice([1, 2, 3]), self.choice([1, 2, 3, 5, 8, 100])
        self.is_soft = self.chance(0.1)  # the targets are probabilities
        self.reduction = self.choice([0, 1, 1, 2])
        self.dtype = self.choice(["float32"] * 4 + ["float64", "bfloat16", "float16"])
        self.wide_dtype = "float64" if self.dtype == "float64" else "float32"

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def tokens(self, shape: str, *dtypes: str) -> str:
        dtype = self.choice(["int64", "int64", *dtypes])
        if dtype == "uint8" and self.V > 256:
            dtype = "int64"
        return f"torch.randint(0, {self.V}, {shape}{'' if dtype == 'int64' else f', dtype=torch.{dtype}'})"

    def numbers(self, shape: str, dtype: str, function: str = "rand") -> str:
        return f"torch.{function}({shape}{'' if dtype == 'float32' else f', dtype=torch.{dtype}'})"

    def option(self, *values: object) -> str:
        """The first of them, or now and then another."""
        return repr(values[0] if self.chance(0.6) else self.choice(values))


def _table(draw: Draw) -> str:
    return draw.numbers(f"{draw.V}, {draw.V}", draw.wide_dtype)


def _targets(draw: Draw) -> str:
    if draw.is_soft:
        return draw.numbers(f"{draw.B}, {draw.T}, {draw.V}", draw.dtype) + ".softmax(-1)"
    return draw.tokens(f"({draw.B}, {draw.T})", "int32", "uint8")


def _grad_loss(draw: Draw) -> str:
    return draw.numbers(f"{draw.B}, {draw.T}" if draw.reduction == 0 else "()", draw.dtype)


# A parameter of a name that is not here is made by its kind alone.
PLAIN: dict[str, str | Callable[[Draw], str]] = {
    "idx": lambda draw: draw.tokens(f"({draw.B}, {draw.T})", "int32"),
    "targets": _targets,
    "tokens": lambda draw: draw.tokens(f"({draw.T + draw.choice([1, 2, 300])},)", "int32", "uint8", "uint16"),
    "weight": lambda draw: draw.numbers(f"{draw.V}, {draw.V}", draw.dtype, "randn"),
    "class_weight": lambda draw: draw.numbers(f"{draw.V}", draw.dtype) if draw.chance(0.3) else "None",
    "grad_loss": _grad_loss,
    "probs": lambda draw: draw.numbers(draw.choice([f"{draw.V}", f"{draw.B}, {draw.V}"]), draw.dtype),
    "param": _table,
    "grad": _table,
    "exp_avg": _table,
    "exp_avg_sq": _table,
    "max_exp_avg_sq": lambda draw: _table(draw) if draw.chance(0.4) else "None",
    "step": "torch.tensor(3.0)",
    "losses": "torch.zeros(3, dtype=torch.float64)",
    "ignore_index": lambda draw: "-100" if draw.is_soft else draw.option(-100, 0),
    "reduction": lambda draw: repr(draw.reduction),
    "label_smoothing": lambda draw: draw.option(0.0, 0.1, 1.0),
    "z_loss": lambda draw: draw.option(0.0, 0.01),
    "padding_idx": lambda draw: draw.option(-1, 0),
    "num_samples": lambda draw: draw.option(1, draw.V, max(1, draw.V // 2)),
    "max_new_tokens": lambda draw: draw.option(3, 0, 1, 40),
    "temperature": lambda draw: draw.option(1.0, 0.5, 0.0),
    "top_k": lambda draw: draw.option(None, 1, 3),
    "top_p": lambda draw: draw.option(None, 0.9, 1.0),
    "min_p": lambda draw: draw.option(None, 0.1, 0.0),
    "stop": lambda draw: draw.option(None, 0),
    "more_stop": lambda draw: draw.option([], [0], [0, draw.V // 2]),
    "crow_indices": lambda draw: f"torch.arange({draw.V + 1})",
    "col_indices": lambda draw: f"torch.arange({draw.V}).int()",
    "pair_probs": lambda draw: f"torch.full(({draw.V},), 0.5)",
    "backoff": lambda draw: f"torch.full(({draw.V},), 0.5)",
    "unigram": lambda draw: f"torch.full(({draw.V},), {1 / draw.V})",
    "vocab_size": lambda draw: repr(draw.V),
    "eot": "None",
    "begin": "0",
    "values": "torch.tensor([1, 2])",
    "batch_size": lambda draw: repr(draw.B),
    "block_size": lambda draw: repr(draw.T),
    "lr": lambda draw: draw.option(0.01, 0.0),
    "beta1": lambda draw: draw.option(0.9, 0.0),
    "beta2": lambda draw: draw.option(0.99, 0.5),
    "eps": lambda draw: draw.option(1e-8, 0.1),
    "weight_decay": lambda draw: draw.option(0.0, 0.1),
    "max_seconds": lambda draw: draw.option(100.0),
    "sampler": lambda draw: draw.option(None, "torch", "philox"),
    "generator": lambda draw: draw.choice(["None", "torch.Generator().manual_seed(7)"]),
    "characters": repr(CHARACTERS),
    "text": lambda draw: repr(CHARACTERS * draw.B),
}
PLAIN_OF_KIND: dict[str, str | Callable[[Draw], str]] = {
    "Tensor": "torch.rand(3, 3)",
    "int": "1",
    "float": "0.5",
    "bool": lambda draw: repr(draw.chance(0.5)),
    "str": "None",
    "list": lambda draw: repr([draw.randrange(len(CHARACTERS)) for _ in range(draw.T)]),
    "Generator": "None",
    "dtype": lambda draw: draw.choice(["None", "torch.float32"]),
    "device": lambda draw: draw.choice(["None", "'cpu'"]),
    "layout": lambda draw: draw.choice(["torch.strided", "torch.sparse_csr"]),
    "PairCounter": "_C.PairCounter(300, None)",
}


# Of the ops whose names begin so.
PLAIN_OF_OP: dict[str, dict[str, str | Callable[[Draw], str]]] = {
    "deferred_adamw_": {
        "grad": lambda draw: _table(draw) if draw.chance(0.5) else "None",
        "rows": lambda draw: draw.choice(["None", f"torch.arange({draw.V})"]),
        "row_steps": lambda draw: f"torch.arange({draw.V}) % 3",
        "schedule": "torch.tensor([[0.01, 0.9, 0.99, 1e-8, 0.1]], dtype=torch.float64).expand(3, 5)",
        "step": "3",
    },
    "fit_": {"row_steps": lambda draw: draw.choice(["None", f"torch.arange({draw.V}) % 3"])},
    "PairCounter": {"crow_indices": "torch.arange(301).clamp(max=2)", "col_indices": "torch.tensor([7, 0])"},
    "interpolated_bigram": {"targets": lambda draw: draw.tokens(f"({draw.B}, {draw.T})", "int32")},
}


def plain(target: Target, parameter: Parameter, draw: Draw) -> str:
    """A valid argument."""
    if target.op.startswith("Alphabet") and parameter.kind == "Tensor":
        return f"torch.randint(0, {len(CHARACTERS)}, ({draw.B}, {draw.T}))"
    if parameter.name == "reduction" and parameter.kind == "str":
        return repr(["none", "mean", "sum"][draw.reduction])
    if parameter.name == "padding_idx" and parameter.is_optional:
        return draw.option(None, 0, -1)
    if parameter.name == "stop" and parameter.kind == "list":
        return draw.option([], [0])
    of_kind = PLAIN_OF_KIND[parameter.kind]
    of_op = next((own for op, own in PLAIN_OF_OP.items() if target.op.startswith(op)), {})
    is_own = target.op.startswith("Alphabet") and parameter.kind == "list"
    made = of_kind if is_own else of_op.get(parameter.name, PLAIN.get(parameter.name, of_kind))
    return made if isinstance(made, str) else made(draw)


# ------------------------------------------------------------------------------------------------ odd arguments

# fmt: off
DTYPES = sorted(
    {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype) and "q" not in str(value)}
)
INTEGERS = [
    -(2**63), -(2**31) - 1, -100, -2, -1, 0, 1, 2, 3, 64, 1000, 2**16, 2**18 + 1, 2**31 - 1, 2**31, 2**32, 2**40,
    2**53 + 1, 2**60, 2**61, 2**62, 2**63 - 2, 2**63 - 1, 2**63,
]
NUMBERS = [
    "float('nan')", "float('inf')", "-float('inf')", "-1.0", "-1e-300", "0.0", "5e-324", "1e-38", "1.0", "1.5", "1e30",
    "1.7e308", "2**63", "10**400",
]
TEXTS = [
    "'torch'", "'philox'", "''", "'Philox'", "'mean'", "'a\\0b'", "'\\ud800'", "'\\U0001F600'", "'x' * 1000", "'aa'",
]
LAYOUTS = ["torch.strided", "torch.sparse_csr", "torch.sparse_coo", "torch.sparse_csc", "torch.jagged", "torch._mkldnn"]
LISTS = [
    "[]", "()", "[-1]", "[8]", "[2**63]", "[2**64]", "[1.5]", "[None]", "['a']", "[True]", "{1, 2}", "range(3)",
    "iter([1])", "(1, 2)",
]
STRANGERS = [
    "None", "5", "1.5", "True", "'a'", "[1, 2]", "object()", "torch.float32", "torch.ones(2)", "torch.Generator()",
    "b'a'",
]
GENERATORS = ["torch.default_generator", "torch.Generator()", "torch.Generator().manual_seed(2**63)"]
DEVICES = ["'meta'", "'nowhere'", "-1", "''", "torch.device('cpu')"]
CONTEXTS = ["torch.no_grad()", "torch.inference_mode()", "torch.enable_grad()", "torch.autocast('cpu', torch.bfloat16)"]

# Elements of a tensor of numbers; and changes of a tensor, {} being the expression so far, by what they change.
ELEMENTS = [
    "float('nan')", "float('inf')", "-float('inf')", "1e-45", "-0.0", "-1.0", "3e38", "-3e38", "1e-38", "1e4", "1e-20",
]
MEMORY = ["guarded({})", "fenced({})", "unaligned({})", "read_only({})"]
STRIDES = ["strided({})", "column_major({})", "expanded({})", "overlapping({})", "{}.mT"]
SHAPES = [
    "{}[:0]", "{}[..., :0]", "{}[0]", "{}[None]", "{}.flatten()", "{}[:1]", "{}[..., :1]", "{}.repeat(2, 1)",
    "{}.sum()",
    "{}[None, None, None]", "{}.squeeze()", "{}[..., None]",
]
KINDS = [
    "negated({})", "conjugated({})", "imaginary({})", "quantized({})", "nested({})", "zero_tensor({})", "own({})",
    "fake({})", "inference({})", "parameter({})", "computed({})", "{}.requires_grad_()", "{}.to_sparse()",
    "{}.to_sparse_csr()", "{}.to_mkldnn()",
]
DEVICES = ["{}.to('meta')", "{}.numpy()"]
LAST = [  # nothing can be made of these
    "freed({})", "freed({})", "shrunk({}, 16)", "huge({}, 2**62, 1)", "huge({}, 2**62)", "huge({}, 1, 2**62)",
    "huge({}, 2**31, 2**31)", "huge({}, 2**32)", "huge({}, 2**20, 2)",
]
ALIASES = ["{}", "{}.detach()", "{}.mT", "{}.flatten()", "{}[...]", "{}[:1]"]
# fmt: on


def odd_tensor(argument: str, parameter: Parameter, earlier: Sequence[str], draw: Draw) -> str:
    """A tensor like the argument with a change or two, another argument, or no tensor."""
    if earlier and draw.chance(0.1):
        return draw.choice(ALIASES).format(draw.choice(earlier))
    if draw.chance(0.06):
        return draw.choice(STRANGERS)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        changes = draw.choice([MEMORY, MEMORY, STRIDES, STRIDES, SHAPES, KINDS, KINDS, DEVICES, None, None, None])
        if draw.chance(0.15):
            return draw.choice(LAST).format(argument)
        if changes is not None:
            change = draw.choice(changes)
        elif draw.chance(0.4):
            change = f"in_dtype({{}}, {draw.choice(DTYPES)})"
        else:
            elements = (
                [-1, -100, draw.V, draw.V - 1, 255, 2**31, 2**63 - 1, -(2**63)] if "randint" in argument else ELEMENTS
            )
            change = f"with_value({{}}, {draw.choice(elements)}, {draw.randrange(1000)})"
        if "read_only" in change and parameter.is_written:
            continue  # what is to be written must be writable; PyTorch's own ops do not survive that either
        argument = change.format(argument)
    return argument


def odd(argument: str, parameter: Parameter, earlier: Sequence[str], draw: Draw) -> str:
    """An argument that is rarely passed, and often wrong."""
    if parameter.kind == "Tensor":
        if argument == "None":
            return draw.choice(earlier) if earlier else "torch.rand(3)"
        return odd_tensor(argument, parameter, earlier, draw)
    if draw.chance(0.15):
        return draw.choice(STRANGERS)
    if parameter.kind == "int":
        return repr(draw.choice([*INTEGERS, draw.V, draw.V - 1, draw.V + 1, draw.T]))
    choices = {
        "layout": LAYOUTS,
        "float": NUMBERS,
        "bool": ["True", "False"],
        "str": TEXTS,
        "list": LISTS,
        "Generator": GENERATORS,
        "device": DEVICES,
    }
    return draw.choice(choices.get(parameter.kind, DTYPES))


def case(seed: int, index: int, targets: Sequence[Target]) -> Case:
    """The case of this number."""
    draw = Draw(f"{seed}/{index}")
    return of_target(draw.choice(targets), draw, f"{seed}/{index}")


def of_target(target: Target, draw: Draw, seed: str = "") -> Case:
    """A call of the target."""
    names = [parameter.name for parameter in target.parameters]
    if "exp_avg" in names:
        draw.dtype = draw.wide_dtype  # AdamW knows no others
    draw.is_soft &= not target.op.endswith(("_forward", "_backward"))  # the kernels know no others
    valid = {parameter.name: plain(target, parameter, draw) for parameter in target.parameters}
    num_odd = min(draw.choices([0, 1, 2, 3, len(names)], [20, 40, 25, 10, 5])[0], len(names))
    chosen = set(draw.sample(names, num_odd))
    arguments: dict[str, str] = {}
    for parameter in target.parameters:
        argument = valid[parameter.name]
        earlier = [p.name for p in target.parameters if p.kind == "Tensor" and "(" in arguments.get(p.name, "")]
        arguments[parameter.name] = odd(argument, parameter, earlier, draw) if parameter.name in chosen else argument
    context = draw.choice(CONTEXTS) if draw.chance(0.1) else ""
    return Case(target, arguments, valid, context, draw.choice([1, 1, 2]), seed)
