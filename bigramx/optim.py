"""AdamW with one fused kernel per parameter, and its deferred form for large tables."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from bigramx import ops
from bigramx.fusion import is_plain_tensor
from bigramx.locks import new_lock
from bigramx.wrappers import module_in

_DTYPES = (torch.float32, torch.float64)
_NUMBER = (float, int)
_LARGEST_LR = torch.finfo(torch.float32).max  # torch's step does not convert larger ones

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]
_Options = tuple[float, float, float, float, float, bool]


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``: the same arguments and state_dict, and the same results up to rounding.

    Each dense float32 or float64 parameter on the CPU, or on a GPU if this build has CUDA kernels, is updated by one
    fused kernel, where that provably gives what torch's own step gives. That step runs for the other parameters (a
    DTensor or another subclass, another dtype, a state or a gradient that is not like its parameter), and for all of a
    group whose options ask for another implementation (``foreach``, ``differentiable``, ``fused``, a tensor as
    ``lr``). A step that raises leaves no parameter and no state
    half updated.

    With ``capturable=True`` the GPU counts the steps, so that a CUDA graph of a step can be replayed.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters from their gradients; ``closure``, if given, recomputes the loss first.

        Returns:
            What ``closure`` returned.
        """
        # The wrapper around the step of a subclass runs the hooks already.
        if not _is_observed(self) or type(self).step is not AdamW.step:
            return _step(self, closure)
        return _observed_step(self) if closure is None else _observed_step(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or with ``set_to_none=False`` sets them to zero."""
        if not set_to_none or _is_observed(self):
            _without_compiler(super().zero_grad)(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with options of their own, as torch.optim.AdamW does.

        Args:
            param_group: ``params``, and the options that differ from those of the optimizer.
        """
        _without_compiler(super().add_param_group)(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The moments, the steps and the options, in torch.optim.AdamW's form."""
        return _without_compiler(super().state_dict)()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state of this optimizer, or of torch.optim.AdamW.

        Raises:
            ValueError: Its groups have other numbers of parameters.
        """
        _without_compiler(super().load_state_dict)(state_dict)

    step.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it: the wrapper is slower than the step


class DeferredAdamW(AdamW):
    """AdamW for a model with a large table, of which a batch meets few rows: the same bits, without reading the rest.

    A row that the batch did not meet has the gradient zero, and misses the step for now. Before it is read next, by a
    forward pass of the model for example, it takes the steps that it missed, one after another, in registers. AdamW
    acts element by element, so each element sees the same operations as in ``AdamW`` on the dense gradient, and has the
    same bits; but memory is touched only for rows that occur. (torch.optim.SparseAdam is another algorithm: there,
    momentum and weight decay stop while a row does not occur.) Give the model a sparse gradient::

        model = BigramLanguageModel(50257, sparse=True)
        optimizer = DeferredAdamW(model, lr=1e-2)

    The rows are up to date wherever the table is seen through the model (``register_table_pre_hook`` says where), and
    in ``state_dict()``, which is that of torch.optim.AdamW. Code that keeps the weight itself calls ``catch_up()``
    before it reads the weight. Other threads may read the table so while one trains.

    Deferred are steps of a float32 or float64 table on the CPU with numbers as options. Any other step is AdamW's, of
    the dense gradient. The model's other parameters take all steps at once.

    With DistributedDataParallel over gloo each rank defers by itself: as the ranks average the sparse gradient, all
    take the same steps, and the tables agree to the bit once they are up to date.

    Args:
        model: A BigramLanguageModel, or one in DistributedDataParallel.
        lr: Learning rate; a scheduler may change it between steps, as it may all options.
        betas: The decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: As in torch.optim.AdamW.
        maximize: Whether to ascend.

    Raises:
        TypeError: ``model`` is none, its parameters for example.
        NotImplementedError: The table is a DTensor or another subclass: each rank has rows that others read.
    """

    _MOST = 1 << 10  # steps that rows may miss: their options stay in the L1 cache

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        module = module_in(model)
        table = module._table()
        weight = getattr(table, "_parameters", {}).get("weight")
        if not isinstance(table, nn.Embedding) or not is_plain_tensor(weight):
            kind = type(table if weight is None else weight).__name__
            raise NotImplementedError(f"DeferredAdamW: not implemented for a table that is a {kind}; use AdamW")
        super().__init__(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        self._weight: Tensor | None = weight
        self._row_steps: Tensor | None = None  # (V) int64, how many steps each row has taken; None: all of them
        self._schedule = torch.empty((self._MOST, 5), dtype=torch.float64, device="cpu")  # the options of steps missed
        self._num_missed = 0  # by the row that has missed most, at most
        self._lock = new_lock()  # of these, and of the rows that take steps
        self._handle = module.register_table_pre_hook(self._before_reading)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters from their gradients; ``closure``, if given, recomputes the loss first.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weight = self._sparse_parameter() if self._weight is None else self._weight
        if weight is None or (grad := weight.grad) is None:
            super().step()
            return loss
        may_defer = self._weight is not None and self._may_defer(weight, grad)
        try:
            if may_defer:
                with self._lock:
                    self._step_rows(weight, grad)
                weight.grad = None  # for the others' step
            else:
                self.catch_up()
                weight.grad = grad.to_dense()
            super().step()
        finally:
            weight.grad = grad
        return loss

    def _sparse_parameter(self) -> Tensor | None:
        """That of a copy whose gradient is sparse: the copy of the table's weight, which it does not know."""
        params = (param for group in self.param_groups for param in group["params"])
        return next((param for param in params if param.grad is not None and param.grad.is_sparse), None)

    @torch.no_grad()
    def catch_up(self, idx: Tensor | None = None) -> None:
        """Takes the steps that rows of the table have missed: those of the tokens ``idx``, int64, or all."""
        with self._lock:
            if self._row_steps is None or self._weight is None:
                return
            step, rows = int(self.state[self._weight]["step"]), None if idx is None else idx.reshape(-1)
            is_between = bool((self._row_steps > step).any())  # a handler looks at a step that is about to be counted
            self._update(self._weight, step + is_between, self._num_missed + is_between, rows, None)
            if idx is None:
                self._row_steps, self._num_missed = None, 0

    def state_dict(self) -> dict[str, Any]:
        """That of torch.optim.AdamW, once all rows have taken all steps."""
        self.catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state of this optimizer, of AdamW, or of torch.optim.AdamW."""
        self.catch_up()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has no model whose reads it could wait for: its steps are AdamW's."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_weight" not in vars(self):
            self._weight = self._row_steps = None
            self._lock = new_lock()

    def _before_reading(self, idx: Tensor | None) -> None:
        may_be_rows = idx is not None and is_plain_tensor(idx) and idx.is_cpu and not _is_intercepted()
        if not may_be_rows or idx is None or idx.dtype not in (torch.int32, torch.int64):
            self.catch_up()
            return
        with contextlib.suppress(IndexError):  # the forward pass says so in its own words
            self.catch_up(idx.long())

    def _group(self) -> dict[str, Any]:
        """The options of the table."""
        groups: list[dict[str, Any]] = self.param_groups
        return next(group for group in groups if any(param is self._weight for param in group["params"]))

    def _may_defer(self, weight: Tensor, grad: Tensor) -> bool:
        group = self._group()
        state = self.state.get(weight, {})
        others = [value for value in state.values() if isinstance(value, Tensor)]
        return (
            weight.is_cpu
            and weight.is_contiguous()
            and weight.dtype in _DTYPES
            and type(grad) is Tensor
            and grad.dtype == weight.dtype
            and grad.layout in (torch.strided, torch.sparse_coo)
            and _kernel_options(group) is not None
            and not (group["amsgrad"] or group["capturable"] or _names_implementation(self, group))
            and state.keys() in (set(), {"step", "exp_avg", "exp_avg_sq"})
            and all(type(value) is Tensor and value.is_cpu and value.is_contiguous() for value in others)
            and all(value.shape in (weight.shape, ()) for value in others)
            and all(value.dtype == weight.dtype for name, value in state.items() if name != "step")
            and (not state or state["step"] + 1 < most_counted(state["step"]))
            and not _is_intercepted()
        )

    @torch.no_grad()
    def _step_rows(self, weight: Tensor, grad: Tensor) -> None:
        """The step of the rows that have a gradient."""
        group = self._group()
        state = state_of(self, weight, group)
        if self._num_missed == self._MOST:
            self.catch_up()
        if self._row_steps is None:
            self._row_steps = torch.full((len(weight),), int(state["step"]), dtype=torch.int64, device="cpu")
        num_missed, step = self._num_missed, int(state["step"])
        options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        self._schedule[num_missed] = torch.tensor(options, dtype=torch.float64, device="cpu")
        rows, values = _rows_of(grad)
        is_taken = False
        try:
            self._update(weight, step + 1, num_missed + 1, rows, values)
            is_taken = True
        finally:  # a signal handler may raise once the kernel is done, or have looked at the table
            if self._row_steps is None:
                state["step"].fill_(step + 1)
            elif is_taken or (self._row_steps > step).any():
                self._num_missed = num_missed + 1
                state["step"].fill_(step + 1)

    def _update(self, weight: Tensor, step: int, num_missed: int, rows: Tensor | None, grad: Tensor | None) -> None:
        state = self.state[weight]
        ops.deferred_adamw_(
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._row_steps,
            self._schedule[:num_missed],
            step,
            rows,
            grad,
            self._group()["maximize"],
        )


def _rows_of(grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows that have a gradient, and it; None for all rows."""
    if grad.layout == torch.strided:
        return None, grad
    if grad.sparse_dim() != 1:
        return None, grad.to_dense()
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks run around a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def state_of(optimizer: torch.optim.Optimizer, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, created on first use."""
    state: dict[str, Any] = optimizer.state[param]
    if not state:
        counts_on = param.device if group["capturable"] else "cpu"
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        step = torch.zeros((), dtype=_step_dtype(), device=counts_on)
        moments = {name: torch.zeros_like(param, memory_format=torch.contiguous_format) for name in names}
        state.update(step=step, **moments)
    return state


def _step_dtype() -> torch.dtype:
    """Wide enough to count: float32, or float64 where that is the default."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def most_counted(step: Tensor) -> int:
    """How many steps a tensor of this dtype can count."""
    return 2**24 if step.dtype == torch.float32 else 2**53


def _is_observed(optimizer: torch.optim.Optimizer) -> bool:
    return has_hooks(optimizer) or profiler._is_profiler_enabled


def _without_compiler(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A method of torch's optimizer, itself where torch wraps it only to keep its compiler out.

    The wrapper imports the compiler for that: seconds of each script, while there is none yet to be kept out.
    """
    bound: Any = method
    function: Any = getattr(bound, "__func__", None)
    is_wrapped = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    if "torch._dynamo" in sys.modules or not is_wrapped:
        return method
    return MethodType(function.__wrapped__, bound.__self__)


def _step(optimizer: torch.optim.AdamW, closure: Callable[[], float] | None = None) -> float | None:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if _is_intercepted():
        _torch_step(optimizer)
        return loss
    grad_mode = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # torch.no_grad() takes as long as half a step
    try:
        updates, others, doubtful = _divide(optimizer)
        if others:  # first, because it may raise
            _torch_step_of(optimizer, others, doubtful)
        for tensors, options in updates:
            ops.adamw_step(*tensors, *options)
    finally:
        torch._C._set_grad_enabled(grad_mode)
    return loss


# With the hooks and the profiler's mark that torch puts around every step.
_observed_step = torch.optim.Optimizer.profile_hook_step(_step)


def _is_intercepted() -> bool:
    """Whether torch.compile or a mode, other than that of a default device, wants to see what a step does."""
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._is_torch_function_mode_enabled() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def _divide(
    optimizer: torch.optim.AdamW,
) -> tuple[list[tuple[_Tensors, _Options]], list[dict[str, Any]], list[Tensor]]:
    """What the kernel updates; groups of the other parameters; and those of them whose options leave it to us."""
    updates, others, doubtful = [], [], []
    for group in optimizer.param_groups:
        is_torchs = _names_implementation(optimizer, group)
        options = None if is_torchs else _kernel_options(group)
        rest = []
        for param in group["params"]:
            if (grad := param.grad) is None:
                continue
            if options is not None and (tensors := _kernel_tensors(optimizer, group, param, grad)) is not None:
                updates.append((tensors, options))
            else:
                rest.append(param)
        if rest:
            others.append({**group, "params": rest})
            if not (is_torchs or _holds_tensors(group)):
                doubtful += rest
    return updates, others, doubtful


def _names_implementation(optimizer: torch.optim.AdamW, group: dict[str, Any]) -> bool:
    """Whether the options name one of torch's implementations, or what only these know."""
    return (
        group["foreach"]
        or group["differentiable"]
        or group["fused"]
        or not group.get("decoupled_weight_decay", True)
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    )


def _kernel_options(group: dict[str, Any]) -> _Options | None:
    """The options that are numbers, if all are, and if torch's step would not raise because of them."""
    lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    are_numbers = (
        isinstance(lr, _NUMBER)
        and isinstance(beta1, _NUMBER)
        and isinstance(beta2, _NUMBER)
        and isinstance(eps, _NUMBER)
        and isinstance(weight_decay, _NUMBER)
    )
    if not are_numbers or not (0 <= beta1 < 1 and 0 <= beta2 < 1 and -_LARGEST_LR <= lr <= _LARGEST_LR):
        return None
    return lr, beta1, beta2, eps, weight_decay, bool(group["maximize"])


def _holds_tensors(group: dict[str, Any]) -> bool:
    """Whether a number among the options is a tensor, which torch's step accepts."""
    return any(isinstance(option, Tensor) for option in (group["lr"], *group["betas"]))


def _kernel_tensors(
    optimizer: torch.optim.AdamW, group: dict[str, Any], param: Tensor, grad: Tensor
) -> _Tensors | None:
    """A parameter and its state, if the kernel's step of them is torch's."""
    if not (is_plain_tensor(param) and type(grad) is Tensor and _may_step(param, group["capturable"])):
        return None
    state = optimizer.state.get(param)
    if not state:
        if not ops.adamw_fits(param, grad, None, None, None, None):
            return None
        state = state_of(optimizer, param, group)
    exp_avg, exp_avg_sq, step = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
    if not (type(exp_avg) is Tensor and type(exp_avg_sq) is Tensor and type(step) is Tensor):
        return None
    largest = None
    if group["amsgrad"] and type(largest := state.get("max_exp_avg_sq")) is not Tensor:
        return None
    fits = ops.adamw_fits(param, grad, exp_avg, exp_avg_sq, largest, step)
    return (param, grad, exp_avg, exp_avg_sq, largest, step) if fits else None


def _may_step(param: Tensor, capturable: bool) -> bool:
    """Whether a kernel exists, and torch's own step would not raise an error about ``capturable``."""
    if param.is_cpu:
        return not capturable
    return ops.HAS_CUDA_KERNELS and param.is_cuda and (capturable or not torch.cuda.is_current_stream_capturing())


def _torch_step(optimizer: torch.optim.AdamW) -> None:
    step = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        step = inspect.unwrap(
            step, stop=lambda function: not getattr(function, "hooked", False)
        )  # the hooks run around our own step already
    step(optimizer)


def _torch_step_of(optimizer: torch.optim.AdamW, groups: list[dict[str, Any]], doubtful: list[Tensor]) -> None:
    """Torch's step of ``groups``. If it raises, the ``doubtful`` parameters and their states are put back."""
    copies = [(tensor, tensor.clone()) for param in doubtful for tensor in _at_risk(param, optimizer.state.get(param))]
    before, twin = dict(vars(optimizer)), _twin_of(optimizer, groups)
    try:
        _torch_step(twin)
    except BaseException:
        with torch.inference_mode():  # which may change every tensor
            for tensor, copy in copies:
                with contextlib.suppress(RuntimeError):  # one that cannot be written to has not changed
                    tensor.copy_(copy)
        raise
    finally:
        changed = {name: value for name, value in vars(twin).items() if value is not before.get(name, _ABSENT)}
        changed.pop("param_groups", None)
        vars(optimizer).update(changed)


_ABSENT = object()


def _twin_of(optimizer: torch.optim.AdamW, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Another optimizer with the same states, and other groups: handlers and threads may look at those of the first."""
    twin: torch.optim.AdamW = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), param_groups=groups)
    for kind in type(optimizer).__mro__:
        for name in vars(kind).get("__slots__", ()):
            if name not in ("__dict__", "__weakref__") and hasattr(optimizer, name):
                setattr(twin, name, getattr(optimizer, name))
    return twin


def _at_risk(param: Tensor, state: dict[str, Any] | None) -> list[Tensor]:
    """The tensors that torch's step changes in part if these do not go together, which it finds out on the way.

    None where the parameter, not its state, kept the kernel from it: in the training of a large model, say, whose
    tensors are shards or of 16 bits.
    """
    held = {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}
    moments = [param, *(value for name, value in held.items() if name != "step")]
    kinds = {(tensor.shape, tensor.dtype, tensor.device) for tensor in (*moments, param.grad) if tensor is not None}
    may_be_kernels = is_plain_tensor(param) and param.dtype in _DTYPES and param.is_contiguous()
    if len(kinds) == 1 and not may_be_kernels and 0 not in param.stride():
        return []
    return [param, *held.values()]
