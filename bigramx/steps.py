"""The steps of fit: native or CUDA graphs where nobody can tell, else PyTorch's own; and their state, to go on from."""

from __future__ import annotations

import gc
import inspect
import itertools
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map

from bigramx import functional, ops
from bigramx.data import TokenShards, get_batch, shards_of
from bigramx.fusion import is_plain_tensor
from bigramx.graph_steps import MOST_STEPS, NOT_TAKEN, GraphSteps, runs_graphs
from bigramx.history import History, encode_state
from bigramx.locks import new_lock
from bigramx.model import BigramLanguageModel
from bigramx.optim import AdamW, has_hooks, most_counted, state_of
from bigramx.storage import checksum
from bigramx.wrappers import is_fsdp, layers_of

# As they were at import: who replaces one of them later wants to see the calls.
_FORWARD, _ADAMW_STEP, _ADAMW_ZERO_GRAD = BigramLanguageModel.forward, AdamW.step, AdamW.zero_grad

_MOST_STEPS = 1 << 14  # of a native call, for each of which there is memory
_CPU = torch.device("cpu")
_DEFERRED_FROM = 1 << 22  # bytes of a table: with AdamW's moments it exceeds the second-level cache


def fsdp_in(model: nn.Module) -> Any:
    """The FullyShardedDataParallel around the model, which holds the parameters in shards; None without one."""
    return next((layer for layer in layers_of(model) if is_fsdp(layer, "FullyShardedDataParallel")), None)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer takes: those of fully_shard are others after a forward pass."""
    for part in model.modules():
        if is_fsdp(part, "FSDPModule"):
            part.reshard()  # type: ignore[operator]
    return list(model.parameters())


def _has_sparse_gradient(model: nn.Module) -> bool:
    return any(getattr(module, "sparse", False) is True for module in model.modules())


def new_optimizer(model: nn.Module, factory: Callable[..., Optimizer] | None, lr: float | None) -> Optimizer:
    """The optimizer that ``factory`` makes, or the default one.

    Raises:
        TypeError: It makes something else, or an optimizer whose step needs a closure.
    """
    parameters = _parameters(model)
    if factory is None:
        default = torch.optim.SparseAdam if _has_sparse_gradient(model) else AdamW
        return default(parameters, lr=1e-2 if lr is None else lr)
    optimizer = factory(parameters) if lr is None else factory(parameters, lr=lr)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected optimizer to make a torch.optim.Optimizer, got {type(optimizer)}")
    _check_step("optimizer", optimizer)
    return optimizer


def new_scheduler(factory: Callable[..., Any], optimizer: Optimizer) -> Any:
    """The scheduler that ``factory`` makes.

    Raises:
        TypeError: It makes something else, or a scheduler whose step needs an argument.
    """
    scheduler = factory(optimizer)
    methods = ("step", "state_dict", "load_state_dict")
    if not all(callable(getattr(scheduler, method, None)) for method in methods):
        raise TypeError(f"expected scheduler to make one of torch.optim.lr_scheduler, got {type(scheduler)}")
    if not isinstance(scheduler, ReduceLROnPlateau):
        _check_step("scheduler", scheduler)
    return scheduler


def _check_step(name: str, made: Any) -> None:
    step = made.step
    if getattr(step, "_wrapped_by_lr_sched", False) is True:  # by a scheduler: its function seems to need self
        step = type(made).step.__get__(made)
    for needed, parameter in inspect.signature(step).parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not is_variadic:
            raise TypeError(
                f"expected {name} to make one whose step() takes no argument, got {type(made).__name__}, whose step() "
                f"needs {needed}"
            )


_Options = tuple[float, float, float, float, float]  # lr, beta1, beta2, eps, weight_decay


@dataclass
class _Deferred:
    """Native steps that rows of a large table have missed, as no batch met them and their gradient is zero."""

    row_steps: Tensor  # (V) int64: how many steps each row has taken
    param: Tensor
    state: dict[str, Any]
    options: _Options  # of AdamW, at all of these steps

    def catch_up(self) -> None:
        """Takes all of them: the table and its state have the bits that steps of all rows leave."""
        step = int(self.state["step"])
        num_steps = step - int(self.row_steps.min())
        if num_steps == 0:
            return
        schedule = torch.tensor([self.options], dtype=torch.float64, device="cpu").expand(num_steps, 5)
        moments = self.state["exp_avg"], self.state["exp_avg_sq"]
        ops.deferred_adamw_(self.param, *moments, self.row_steps, schedule, step, None, None, False)


@dataclass
class Steps:
    """What a step needs, and three implementations of steps, which record the losses."""

    model: nn.Module
    module: BigramLanguageModel  # the model, or the one inside its wrapper
    optimizer: Optimizer
    scheduler: Any  # None without one
    max_grad_norm: float | None
    history: History
    tokens: Tensor | TokenShards
    batch_size: int
    block_size: int
    generator: torch.Generator | None
    is_saving_checked: bool = False
    is_torn: bool = False  # a step of the optimizer or of the scheduler was left in its middle
    deferred: _Deferred | None = None  # rows of the table have missed steps
    graphs: GraphSteps | None = None
    can_capture: bool = True
    lock: Any = field(default_factory=new_lock)  # of deferred rows: another thread may save the history

    def begin(self, lr: float | None) -> None:
        """Goes on where the history ends, at the learning rate ``lr`` if one is given.

        Raises:
            ValueError: The history is of another model, optimizer or scheduler.
            TypeError: A state is of a type that History.save cannot save.
        """
        if self.max_grad_norm is not None and _has_sparse_gradient(self.model):
            raise NotImplementedError("max_grad_norm: torch.nn.utils.clip_grad_norm_ takes no sparse gradients")
        if self.history.step > 0 or self.history.optimizer_state is not None:
            self._check_resume()
            self._restore(lr)
        self._check_saving()

    def _check_resume(self) -> None:
        if self.history.table_checksum is None:
            raise ValueError(
                "resume: the history is not of this model: its run ended within a step, or the table could not be read"
            )
        if self.history.table_checksum != _checksum(self.model):
            raise ValueError("resume: the history is not of this model: its run ended with another table")
        for what, given, expected in (
            ("optimizer", self.optimizer, self.history.optimizer_name),
            ("scheduler", self.scheduler, self.history.scheduler_name),
        ):
            name = None if given is None else type(given).__name__
            if name != expected:
                raise ValueError(f"resume: the history's {what} is not {name} but {expected}")

    def _restore(self, lr: float | None) -> None:
        history = self.history
        rates = [group.get("initial_lr") for group in self.optimizer.param_groups]
        if self.scheduler is not None and history.scheduler_state is not None:
            self.scheduler.load_state_dict(history.scheduler_state)
        if history.optimizer_state is not None:
            _load_state(self.optimizer, history.optimizer_state)
        if lr is not None and self.scheduler is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        elif lr is not None and rates != [group.get("initial_lr") for group in self.optimizer.param_groups]:
            raise ValueError(f"resume: the history's scheduler began at another learning rate than lr = {lr}")
        if history.generator_state is not None:
            _set_state(self.generator, history.generator_state)
        if history.scheduler_is_due:
            self._step_scheduler(history.losses[-1])

    def _check_saving(self) -> None:
        """Raises a TypeError where the states cannot be saved."""
        encode_state(_local(self.optimizer.state_dict()), "optimizer_state", {})
        if self.scheduler is not None:
            encode_state(_local(self.scheduler.state_dict()), "scheduler_state", {})

    def record(self) -> None:
        """Brings the states in the history up to date, so that the run can be resumed from it."""
        history = self.history
        self.catch_up()
        history.table_checksum = None  # until all belong to the same step
        history.optimizer_state = _local(self.optimizer.state_dict())
        history.optimizer_name = type(self.optimizer).__name__
        if self.scheduler is not None:
            history.scheduler_state = _local(self.scheduler.state_dict())
            history.scheduler_name = type(self.scheduler).__name__
        history.generator_state = _get_state(self.generator)
        history.table_checksum = None if self.is_torn else _checksum(self.model)

    def take(self, most: int) -> None:
        """Takes at least one step and at most ``most``, as long as Ctrl-C may wait; records the losses.

        An exception leaves table, states, losses and generator at the same step, or ``is_torn`` says that it did not.
        """
        if self.has_native_steps():
            self._take_native(min(most, _MOST_STEPS))
        else:
            self._catch_up_for_good()
            num_steps = self._prepare_graph(most) if self._has_graph_steps() else 0
            if num_steps > 0:
                self._take_graph(num_steps)
            else:
                self._take_one()
        if not self.is_saving_checked:  # the first step makes the optimizer's states
            self._check_saving()
            self.is_saving_checked = True

    def has_native_steps(self) -> bool:
        """Whether steps are native calls."""
        return self._has_kernel_steps() and self._weight().is_cpu and len(shards_of(self.tokens)) == 1

    def _has_graph_steps(self) -> bool:
        """Whether steps may be CUDA graphs, as far as can be told without capturing one."""
        if not (self.can_capture and self._has_kernel_steps() and runs_graphs(self._weight())):
            return False
        if self.generator is not None and self.generator.device.type != "cpu":
            return False
        state = self.optimizer.state.get(self._weight(), {})
        return not state or (
            state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and 0 <= int(state["step"]) <= most_counted(state["step"]) - MOST_STEPS
        )

    def _weight(self) -> Tensor:
        return self.module.token_embedding_table.weight

    def _has_kernel_steps(self) -> bool:
        """Whether the kernels do all that a step does, and nobody can tell."""
        return (
            self.model is self.module
            and self.module._table_pre_hooks is None
            and self.scheduler is None
            and self.max_grad_norm is None
            and self.module.is_fused
            and self.module._has_plain_loss()
            and BigramLanguageModel.forward is _FORWARD
            and self.module._compiled_call_impl is None
            and _is_plain_leaf(self.module.token_embedding_table)
            and _is_plain_adamw(self.optimizer, self.module.token_embedding_table.weight)
            and not _is_observed(self._weight().device.type)
        )

    @torch.no_grad()
    def catch_up(self) -> None:
        """Brings all rows of the table up to date. Whoever lets others see the table calls this first.

        A signal handler may do so in the middle of a native call, between two of its steps.
        """
        with self.lock:
            if self.deferred is not None:
                self.deferred.catch_up()
        self.module._before_reading()  # the optimizer may be a DeferredAdamW

    def _catch_up_for_good(self) -> None:
        with self.lock:
            if self.deferred is not None:
                self.deferred.catch_up()
            self.deferred = None

    @property
    def are_deferred(self) -> bool:
        """Whether rows of the table may have missed steps."""
        return self.deferred is not None or self.module._table_pre_hooks is not None

    def _row_steps(self, param: Tensor, state: dict[str, Any], options: _Options) -> Tensor | None:
        """How many steps each row of the table has taken; None where all rows take each step."""
        step = int(state["step"])
        if param.nbytes < _DEFERRED_FROM or step + _MOST_STEPS > most_counted(state["step"]):
            self.catch_up()
            self.deferred = None
            return None
        deferred = self.deferred
        if deferred is not None and (deferred.param is not param or deferred.options != options):
            self.catch_up()
        if deferred is None or not (deferred.row_steps < step).any():  # a callback may have set the step
            row_steps = torch.full((len(param),), step, dtype=torch.int64, device="cpu")
            self.deferred = deferred = _Deferred(row_steps, param, state, options)
        return deferred.row_steps

    @torch.no_grad()
    def _take_native(self, most: int) -> None:
        """Takes as many steps as fit into the time for which Ctrl-C may wait."""
        max_seconds = 0.05
        table, (group,) = self.module.token_embedding_table, self.optimizer.param_groups
        table.weight.grad = None
        state = state_of(self.optimizer, table.weight, group)
        options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        losses = torch.full((most,), NOT_TAKEN, dtype=torch.float64, device="cpu")
        try:
            with self.lock:
                ops.fit_(
                    table.weight,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["step"],
                    losses,
                    shards_of(self.tokens)[0].cpu(),
                    self.batch_size,
                    self.block_size,
                    functional._padding_row(table.padding_idx, table.weight),
                    *options,
                    max_seconds,
                    self.generator,
                    self._row_steps(table.weight, state, options),
                )
        finally:  # a signal handler may raise between two steps
            self.history.losses += losses[losses != NOT_TAKEN].tolist()

    @torch.no_grad()
    def _prepare_graph(self, most: int) -> int:
        """How many steps, at most ``most``, a graph is ready for; 0 if none can be captured, from here on."""
        table, (group,) = self.module.token_embedding_table, self.optimizer.param_groups
        table.weight.grad = None
        state = state_of(self.optimizer, table.weight, group)
        options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        padding_idx = functional._padding_row(table.padding_idx, table.weight)
        parts = (table.weight, state["exp_avg"], state["exp_avg_sq"], options, padding_idx)
        try:
            if self.graphs is None or not self.graphs.fits(*parts):
                self.graphs = None  # first, as its memory may be needed
                self.graphs = GraphSteps(*parts, self.batch_size, self.block_size)
            return self.graphs.prepare(most)
        except RuntimeError:
            self.graphs, self.can_capture = None, False
            return 0

    @torch.no_grad()
    def _take_graph(self, num_steps: int) -> None:
        """Takes all of the steps, or none if an exception comes first."""
        assert self.graphs is not None
        weight = self._weight()
        state, before, version = self.optimizer.state[weight], _get_state(self.generator), weight._version
        try:
            pairs = self._draw(num_steps)
            self.is_torn = True
            self.graphs.launch(pairs, int(state["step"]))
        finally:  # a signal handler may raise once the steps run
            losses = self.graphs.losses(num_steps)
            if NOT_TAKEN in losses:
                _set_state(self.generator, before)
                self.is_torn = weight._version != version
            else:
                self.history.losses += losses
                state["step"] += num_steps
                self.is_torn = False

    @torch.enable_grad()
    def _take_one(self) -> None:
        """Takes one step, for a model on any device, with any table and optimizer."""
        before, marks = _get_state(self.generator), None
        try:
            pairs, loss = self._loss_of_a_batch()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._clip_gradients()
            value = loss.item()
            marks = self._marks(pairs)
            self.is_torn = True
            self.optimizer.step()
        except BaseException:
            if marks is not None:
                self.is_torn = not _are_equal(marks, self._marks(pairs))
            if not self.is_torn:
                _set_state(self.generator, before)  # the step was not taken: the next one draws its batch
            raise
        self.history.losses.append(value)
        self.history.scheduler_is_due = self.scheduler is not None
        self.is_torn = False
        self._step_scheduler(value)

    def _draw(self, num_batches: int) -> tuple[Tensor, Tensor]:
        """The pairs of the next batches, (num_batches B, T) each, on the model's device."""
        device = next(self.model.parameters()).device
        size = num_batches * self.batch_size
        return get_batch(self.tokens, size, self.block_size, generator=self.generator, device=device)

    def _loss_of_a_batch(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        pairs = self._draw(1)
        # Where nobody sees the logits they are spared; a forward of a subclass may not know the option.
        options = {"return_logits": False} if self.module.is_fused and not _want_logits(self.model) else {}
        _logits, loss = self.model(*pairs, **options)
        mean: Tensor = loss.mean() if isinstance(self.model, nn.DataParallel) else loss  # over several devices
        return pairs, mean

    def _marks(self, pairs: tuple[Tensor, Tensor]) -> tuple[list[object], Tensor] | None:
        """What tells whether a step of the optimizer has changed anything; None where nothing can tell.

        The numbers of its states, and how often its tensors were written; as writes through ``.data`` are not counted,
        the entries of the table that have a gradient as well.
        """
        table = self.module._modules.get("token_embedding_table")
        weight = None if table is None else table._parameters.get("weight")  # none that is computed at each look
        if weight is None or weight.dim() != 2 or not is_plain_tensor(weight) or fsdp_in(self.model) is not None:
            return None
        entries = weight.detach()[pairs[0] % weight.size(0), pairs[1] % weight.size(1)]  # of a forward of one's own
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        values = itertools.chain(*(group["params"] for group in self.optimizer.param_groups), states)
        return [value._version if isinstance(value, Tensor) else value for value in values], entries

    def _clip_gradients(self) -> None:
        if self.max_grad_norm is None:
            return
        if (fsdp := fsdp_in(self.model)) is not None:
            fsdp.clip_grad_norm_(self.max_grad_norm)
        else:
            nn.utils.clip_grad_norm_(_parameters(self.model), self.max_grad_norm)

    def _step_scheduler(self, loss: float) -> None:
        """Lets the scheduler follow a step, for which it is due; one that raises is put back, and stays due."""
        if self.scheduler is None:
            return
        before = dict(self.scheduler.state_dict())
        groups = [_options_of(group) for group in self.optimizer.param_groups]
        try:
            self.scheduler.step(*[loss] if isinstance(self.scheduler, ReduceLROnPlateau) else [])
        except BaseException:
            self.is_torn = True
            self.scheduler.load_state_dict(before)
            for group, options in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(options)
            self.is_torn = False
            raise
        self.history.scheduler_is_due = False


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of what a scheduler may change in a group of parameters."""
    options = {name: value for name, value in group.items() if name != "params"}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}


def _are_equal(marks: tuple[list[object], Tensor], others: tuple[list[object], Tensor] | None) -> bool:
    return others is not None and marks[0] == others[0] and torch.equal(marks[1], others[1])


def _want_logits(model: nn.Module) -> bool:
    """Whether hooks, or a wrapper's forward that is none of PyTorch's, may look at them."""
    *wrappers, _module = layers_of(model)
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(model)) or any(
        not hasattr(layer, "_orig_mod")  # torch.compile's has one
        and ("forward" in vars(layer) or not type(layer).forward.__module__.startswith("torch."))
        for layer in wrappers
    )


def _is_plain_leaf(table: nn.Embedding) -> bool:
    """Whether a kernel may write the weight: a contiguous parameter whose gradient nobody waits for."""
    weight = table.weight
    return (
        weight.is_leaf
        and weight.requires_grad
        and (weight.is_cpu or weight.is_cuda)
        and weight.is_contiguous()
        and not weight.is_inference()
        and weight.shape == (table.num_embeddings, table.num_embeddings)
        and weight.dtype in (torch.float32, torch.float64)
        and weight.grad_dtype in (None, weight.dtype)
        and not (weight._backward_hooks or weight._post_accumulate_grad_hooks)
        and not _may_have_accumulator_hooks(weight)
    )


@torch.enable_grad()
def _may_have_accumulator_hooks(weight: Tensor) -> bool:
    """Whether the node that accumulates the gradient may have hooks, which PyTorch does not tell.

    The garbage collector sees them, but not while a graph holds the node; then its hooks are those of someone who holds
    it as well.
    """
    twin = torch.zeros(1, device="cpu", requires_grad=True)
    _graph = twin.view_as(twin)
    nodes = [torch.autograd.graph.get_gradient_edge(tensor).node for tensor in (weight, twin)]
    owners_of_weight, owners_of_twin = map(sys.getrefcount, nodes)
    return any(gc.get_referents(nodes[0])) or owners_of_weight > owners_of_twin


def _is_plain_adamw(optimizer: Optimizer, weight: Tensor) -> bool:
    """Whether a step is AdamW's as the kernel computes it, of the weight alone."""
    if type(optimizer) is not AdamW or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    state = optimizer.state.get(weight, {})
    special = ("amsgrad", "maximize", "foreach", "differentiable", "fused")
    step_device = weight.device if group["capturable"] else _CPU
    return (
        (AdamW.step, AdamW.zero_grad) == (_ADAMW_STEP, _ADAMW_ZERO_GRAD)
        and not {"step", "zero_grad"} & vars(optimizer).keys()
        and not has_hooks(optimizer)
        and len(group["params"]) == 1
        and group["params"][0] is weight
        and group["decoupled_weight_decay"]
        and not any(group[name] for name in special)
        and not (group["capturable"] and weight.is_cpu)
        and all(type(group[name]) in (int, float) for name in ("lr", "eps", "weight_decay"))
        and all(type(beta) in (int, float) for beta in group["betas"])
        and all(is_plain_tensor(value) and value.is_contiguous() for value in state.values())
        and all(value.device == (step_device if name == "step" else weight.device) for name, value in state.items())
        and all(value.dtype == weight.dtype for name, value in state.items() if name != "step")
    )


def _is_observed(device_type: str) -> bool:
    """Whether PyTorch shows, checks or changes the operations of a step; those that a fused model asks for apart."""
    return (
        torch.is_anomaly_enabled()
        or torch.is_autocast_enabled(device_type)
        or torch._C._autograd._profiler_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def _local(state: Any) -> Any:
    """The state with the shard of this process in place of each DTensor."""
    return tree_map(lambda value: value.to_local() if hasattr(value, "to_local") else value, state)


def _load_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """optimizer.load_state_dict, which casts states to the dtype of their parameter: here they keep their own."""
    indices = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    param_of = dict(zip(indices, params, strict=False))  # of different lengths, load_state_dict raises
    state = {index: _as_sharded(entries, param_of.get(index)) for index, entries in saved["state"].items()}
    try:
        optimizer.load_state_dict({**saved, "state": state})
    except ValueError as error:
        raise ValueError(f"resume: {error}") from None
    for index, param in param_of.items():
        loaded = optimizer.state.get(param, {})
        for name, value in state.get(index, {}).items():
            if isinstance(value, Tensor) and value.dtype != loaded[name].dtype:
                loaded[name] = value.to(loaded[name].device)


def _as_sharded(entries: Any, param: Any) -> Any:
    """The entries of a parameter's state, each shard as the DTensor that it is of where the parameter is one."""
    if not hasattr(param, "to_local"):
        return entries
    from torch.distributed.tensor import DTensor

    def as_sharded(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != param.to_local().shape:
            return value
        layout = {"run_check": False, "shape": param.shape, "stride": param.stride()}
        return DTensor.from_local(value.to(param.device), param.device_mesh, param.placements, **layout)

    return tree_map(as_sharded, entries)


def _checksum(model: nn.Module) -> int:
    """CRC-32 of the parameters, of the table if there is no other."""
    sums = [checksum(_local(parameter.detach()).cpu().contiguous()) for parameter in _parameters(model)]
    return sums[0] if len(sums) == 1 else zlib.crc32(repr(sums).encode())


def _get_state(generator: torch.Generator | None) -> Tensor:
    return (generator or torch.default_generator).get_state()


def _set_state(generator: torch.Generator | None, state: Tensor) -> None:
    (generator or torch.default_generator).set_state(state)
