"""What only a GPU can show: results equal to the CPU's, streams, graphs, launches, memory, large offsets, assertions.

The tests named test_sanitize_* run each op at small sizes, under compute-sanitizer (make sanitize).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bigramx import BigramLanguageModel, CharTokenizer, History, data, fit, functional, optim, reference
from bigramx.graph_steps import GraphSteps
from tests import processes
from tests.devices import nothing_waits

pytestmark = pytest.mark.cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKEN_DTYPES = [torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64]
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


def seeded(device: torch.device = CPU) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


@dataclass
class Inputs:
    """The inputs of all ops, with the same values on any device."""

    weight: Tensor
    probs: Tensor  # rounded by one device
    idx: Tensor
    targets: Tensor
    tokens: Tensor
    moments: Tensor  # (4, N): param, grad, exp_avg, exp_avg_sq

    @staticmethod
    def make(device: torch.device, vocab_size: int = 65, dtype: torch.dtype = torch.float32) -> Inputs:
        torch.manual_seed(1)
        size = 5 * vocab_size
        weight = torch.randn(vocab_size, vocab_size, dtype=torch.float64).to(dtype)
        idx, targets, tokens = (torch.randint(vocab_size, (size,)) for _ in range(3))
        inputs = Inputs(weight, weight.softmax(-1), idx, targets, tokens, torch.rand(4, size))
        return inputs.moved(lambda tensor: tensor.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*map(move, vars(self).values()))


def loss_and_gradient(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    weight = inputs.weight.detach().requires_grad_()
    loss: Any = functional.embedding_cross_entropy(inputs.idx, weight, inputs.targets, **options)
    loss.backward(torch.ones_like(loss))
    assert weight.grad is not None
    return loss.detach(), weight.grad


def results_of(inputs: Inputs) -> dict[str, Any]:
    """The results of each op."""
    probs, few = inputs.probs, min(9, len(inputs.probs))
    start = inputs.idx.view(-1, 5)
    param, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in inputs.moments)
    functional.adamw_(param, grad, exp_avg, exp_avg_sq, step=torch.tensor(3.0), **HYPERPARAMETERS)
    return {
        "mean": loss_and_gradient(inputs, label_smoothing=0.1),
        "sum": loss_and_gradient(inputs, reduction="sum", z_loss=0.01),
        "none": loss_and_gradient(inputs, reduction="none"),
        "sparse": loss_and_gradient(inputs, sparse=True),
        "generate": functional.generate(start, inputs.weight, 50, sampler="philox", generator=seeded()),
        "multinomial": functional.multinomial(probs, 1, sampler="philox", generator=seeded()),
        "with replacement": functional.multinomial(probs, 9, True, sampler="philox", generator=seeded()),
        "without": functional.multinomial(probs, few, sampler="philox", generator=seeded()),
        "count_bigrams": functional.count_bigrams(inputs.tokens, len(inputs.weight)),
        "get_batch": data.get_batch(inputs.tokens, 500, 8, generator=seeded()),
        "adamw_": (param, exp_avg, exp_avg_sq),
    }


def assert_same(actual: Any, expected: Any) -> None:
    """On any devices; up to rounding, integers exactly."""
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        actual, expected = tuple(actual.values()), tuple(expected.values())
    if isinstance(actual, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif actual.is_floating_point():
        actual, expected = (t.to_dense() if t.is_sparse else t for t in (actual, expected))
        torch.testing.assert_close(actual, expected, check_device=False)
    else:
        assert torch.equal(actual.cpu(), expected.cpu())


# ------------------------------------------------------------------------------------- results equal to the CPU's


@pytest.mark.parametrize("vocab_size", [2, 65, 300, 2000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ops_equal_the_cpus(vocab_size: int, dtype: torch.dtype) -> None:
    expected = results_of(Inputs.make(CPU, vocab_size, dtype))
    assert_same(results_of(Inputs.make(GPU, vocab_size, dtype)), expected)


@pytest.mark.parametrize("vocab_size", [1, 65, 1000, 5000])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("num_chains", "num_tokens"), [(1, 40_000), (64, 300), (5000, 20)])
def test_chains_equal_the_cpus(vocab_size: int, filters: dict[str, Any], num_chains: int, num_tokens: int) -> None:
    weight, idx = 2 * torch.randn(vocab_size, vocab_size), torch.randint(vocab_size, (num_chains, 3))
    for stop in (None, 0, [0, vocab_size - 1]):
        options = {**filters, "stop": stop, "sampler": "philox"}
        expected = functional.generate(idx, weight, num_tokens, generator=seeded(), **options)
        actual = functional.generate(idx.to(GPU), weight.to(GPU), num_tokens, generator=seeded(), **options)
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_tokens_of_all_types_equal_the_cpus(dtype: torch.dtype, step: int) -> None:
    whole = torch.randint(200, (3_000_000,)).to(dtype)
    tokens, on_gpu = whole[::step], whole.to(GPU)[::step]
    assert_same(functional.count_bigrams(on_gpu, 200), functional.count_bigrams(tokens, 200))
    expected = data.get_batch(tokens, 1000, 17, generator=seeded())
    assert_same(data.get_batch(on_gpu, 1000, 17, generator=seeded()), expected)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "maximize": True}, {"weight_decay": 0.5, "eps": 1e-3}], ids=str
)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_the_optimizer_equals_torchs(options: dict[str, Any], capturable: bool) -> None:
    states = []
    for optimizer_class in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        param = torch.nn.Parameter(torch.randn(33, 7, device=GPU))
        optimizer = optimizer_class([param], capturable=capturable, **options)
        for _ in range(20):
            optimizer.zero_grad()
            (param - 1).square().sum().backward()
            optimizer.step()
        states.append((param.detach(), optimizer.state_dict()["state"][0]))
    torch.testing.assert_close(states[0], states[1])


def test_a_model_is_trained_evaluated_and_generates() -> None:
    text = data.default_text()[:100_000]
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text).to(GPU, torch.uint8)
    model = BigramLanguageModel(tokenizer.vocab_size, device=GPU)
    history = fit(model, tokens, max_steps=2000, eval_interval=1000, lr=0.03)
    assert history.optimum <= history.train_losses[-1] <= 1.1 * history.optimum
    assert len(tokenizer.decode(model.generate(tokens[:1].long().view(1, 1), 500))) == 501


def trained(device: torch.device, tokens: Any, **options: Any) -> tuple[BigramLanguageModel, History]:
    torch.manual_seed(1)
    model = BigramLanguageModel(65).to(device)
    options = {"max_steps": 700, "eval_interval": 300, "generator": seeded(), **options}
    return model, fit(model, tokens, **options)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the graphs of fit were launched on."""
    sizes: list[int] = []
    launch = GraphSteps.launch

    def recorded(steps: GraphSteps, pairs: tuple[Tensor, Tensor], count: int) -> None:
        sizes.append(pairs[0].numel())
        launch(steps, pairs, count)

    monkeypatch.setattr(GraphSteps, "launch", recorded)
    return sizes


def places_of(tokens: Tensor, folder: Path) -> dict[str, Tensor | data.TokenShards]:
    """The same tokens, on the GPU and wherever the host may have them."""
    (folder / "tokens.bin").write_bytes(tokens.numpy().tobytes())
    return {
        "GPU": tokens.to(GPU),
        "host": tokens,
        "pinned": tokens.pin_memory(),
        "mapped": data.read_tokens(folder / "tokens.bin", dtype=tokens.dtype),
        "shards": data.TokenShards(tokens.split(1000)),
    }


@pytest.mark.parametrize("place", ["GPU", "host", "pinned", "mapped", "shards"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_graphs_of_fit_equal_the_steps_of_the_cpu(
    place: str, capturable: bool, launched: list[int], tmp_path: Path
) -> None:
    tokens = places_of(torch.randint(65, (5000,)).to(torch.uint16), tmp_path)[place]
    on_cpu = tokens.cpu() if isinstance(tokens, Tensor) else tokens
    expected, history_on_cpu = trained(CPU, on_cpu)
    assert launched == []
    model, history = trained(GPU, tokens, optimizer=partial(optim.AdamW, lr=0.01, capturable=capturable))
    assert sum(launched) == 700 * 32 * 8
    assert max(launched) > 32 * 8
    torch.testing.assert_close(history.generator_state, history_on_cpu.generator_state)
    assert history.losses == pytest.approx(history_on_cpu.losses, abs=1e-4)
    assert history.train_losses == pytest.approx(history_on_cpu.train_losses, abs=1e-4)
    torch.testing.assert_close(model.cpu().state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-4)
    assert int((history.optimizer_state or {})["state"][0]["step"]) == 700


def test_fit_by_a_generator_on_the_gpu_runs_in_python(launched: list[int]) -> None:
    _model, history = trained(GPU, torch.randint(65, (5000,), device=GPU), max_steps=9, generator=seeded(GPU))
    assert (history.step, launched) == (9, [])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("place", ["host", "pinned", "mapped", "shards"])
def test_batches_go_to_the_gpu_through_pinned_memory(place: str, tmp_path: Path) -> None:
    tokens = torch.randint(65, (5000,)).to(torch.uint16)
    source = places_of(tokens, tmp_path)[place]

    def draw(source: Any) -> tuple[Tensor, ...]:
        generator = seeded()
        batches = [data.get_batch(source, 300, 17, generator=generator, device=GPU) for _ in range(9)]
        return tuple(torch.stack(batch) for batch in batches)

    expected = draw(tokens.to(GPU))
    with nothing_waits():
        actual = draw(source)
    assert_same(actual, expected)


# -------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_cpus(dtype: torch.dtype, lower: torch.dtype) -> None:
    results = []
    for device in (CPU, GPU):
        inputs = Inputs.make(device, 65, dtype)
        with torch.autocast(device.type, dtype=lower):
            results.append(
                {
                    "mean": loss_and_gradient(inputs, z_loss=0.01),
                    "none": loss_and_gradient(inputs, reduction="none"),
                    "weighted": loss_and_gradient(inputs, class_weight=inputs.probs[0].to(dtype)),
                }
            )
    assert [loss.dtype for loss, _ in results[1].values()] == [loss.dtype for loss, _ in results[0].values()]
    assert_same(results[1], results[0])


def test_fit_under_autocast_runs_in_python_as_on_the_cpu(launched: list[int]) -> None:
    tokens, results = torch.randint(65, (5000,)), []
    for device in (CPU, GPU):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(trained(device, tokens, max_steps=50)[1].losses)
    assert launched == []
    assert results[1] == pytest.approx(results[0], abs=1e-4)


# ------------------------------------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("vocab_size", [7, 65, 300])
def test_coalesced_sparse_gradients(vocab_size: int) -> None:
    """The CPU's rows, and none of the entries that were too many."""
    _loss, expected = loss_and_gradient(Inputs.make(CPU, vocab_size), sparse=True)
    _loss, gradient = loss_and_gradient(Inputs.make(GPU, vocab_size), sparse=True)
    coalesced = gradient.coalesce()
    torch.testing.assert_close(coalesced.to_dense().cpu(), expected.to_dense())
    assert set(expected.indices()[0].tolist()) <= set(coalesced.indices()[0].tolist())


# -------------------------------------------------------------------------------------- generators on the GPU


def gpu_seed(seed: int, offset: int) -> int:
    """The seed that the ops draw from a generator on the GPU in this state."""
    low, high = (int(reference.philox(seed, torch.tensor(offset), k)) for k in (0, 1))
    return high << 32 | low


def test_batches_by_a_generator_on_the_gpu() -> None:
    tokens, generator = torch.arange(1000, device=GPU), seeded(GPU)
    for offset in (0, 4):
        assert generator.get_offset() == offset
        idx, targets = data.get_batch(tokens, 600, 3, generator=generator)
        low, high = (reference.philox(gpu_seed(1, offset), torch.arange(600), k).tolist() for k in (0, 1))
        starts = [(h << 32 | w) * 997 >> 64 for w, h in zip(low, high, strict=True)]
        assert torch.equal(idx.cpu(), torch.tensor(starts)[:, None] + torch.arange(3))
        assert torch.equal(targets, idx + 1)


def test_tokens_by_a_generator_on_the_gpu() -> None:
    inputs = Inputs.make(GPU)
    idx = inputs.idx.view(-1, 5)

    def draw(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return (
            functional.generate(idx, inputs.weight, 50, generator=generator),
            functional.multinomial(inputs.probs, 9, generator=generator),
        )

    generator = seeded(GPU)
    first, second = draw(generator), draw(generator)
    assert generator.get_offset() == 16
    assert_same(draw(seeded(GPU)), first)
    for one, other in zip(first, second, strict=True):
        assert not torch.equal(one, other)
    torch.cuda.manual_seed(1)
    assert_same(draw(None), first)


# --------------------------------------------------------------------------------------- streams and devices


def test_a_stream_other_than_the_default() -> None:
    """The inputs are wrong until the stream has copied them."""
    expected = results_of(Inputs.make(GPU))
    prepared, inputs = Inputs.make(GPU), Inputs.make(GPU).moved(torch.zeros_like)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        for late, tensor in zip(vars(inputs).values(), vars(prepared).values(), strict=True):
            late.copy_(tensor)
        actual = results_of(inputs)
    stream.synchronize()
    assert_same(actual, expected)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    with torch.cuda.device(0):
        assert_same(results_of(Inputs.make(other)), results_of(Inputs.make(CPU)))
        param = torch.nn.Parameter(torch.ones(5, device=other))
        param.grad = torch.ones_like(param)
        optim.AdamW([param], capturable=True).step()
        idx, _targets = data.get_batch(torch.arange(100, device=other), 4, 8, generator=seeded(other))
        assert idx.device == other
        assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------- no synchronization, no growing memory


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_op_waits_for_the_gpu() -> None:
    inputs, model = Inputs.make(GPU), BigramLanguageModel(65, device=GPU)
    optimizers = [optim.AdamW(model.parameters(), capturable=capturable) for capturable in (False, True)]

    def run() -> None:
        results_of(inputs)
        for generator in (None, seeded(GPU)):
            idx, targets = data.get_batch(inputs.tokens, 32, 8, generator=generator)
            functional.generate(idx, inputs.weight, 50, generator=generator)
            functional.multinomial(inputs.probs, 9, generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
            logits, loss = model(idx, targets)
            (0.5 * loss + logits.mean()).backward()
            optimizer.step()

    run()
    with nothing_waits():
        run()


def test_memory_does_not_grow() -> None:
    inputs, model = Inputs.make(GPU), BigramLanguageModel(65, device=GPU)
    optimizer = optim.AdamW(model.parameters())
    allocated = []
    for step in range(1001):
        idx, targets = data.get_batch(inputs.tokens, 32, 8)
        _logits, loss = model(idx, targets, return_logits=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            results_of(inputs)
            allocated.append(torch.cuda.memory_allocated())
    assert allocated[1:] == allocated[1:2] * 10


@pytest.mark.filterwarnings("ignore")  # the profiler's, about itself
def test_forward_and_backward_are_few_launches() -> None:
    model = BigramLanguageModel(65, device=GPU)
    idx, targets = (torch.randint(65, (32, 8), device=GPU) for _ in range(2))

    def run() -> None:
        model.zero_grad()
        model(idx, targets, return_logits=False)[1].backward()
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    on_gpu = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels = [name for name in on_gpu if not name.startswith(("Memset", "Memcpy")) and "Sync" not in name]
    assert 1 <= len(kernels) <= 3, kernels


# ------------------------------------------------------------------------------------------------------- graphs


class Trainer:
    """Training steps that do not depend on the host."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = BigramLanguageModel(65, device=GPU)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-2, capturable=True)
        self.tokens = torch.randint(65, (5000,), device=GPU)
        self.generator = seeded(GPU)

    def step(self) -> Tensor:
        idx, targets = data.get_batch(self.tokens, 32, 8, generator=self.generator)
        self.optimizer.zero_grad()
        _logits, loss = self.model(idx, targets, return_logits=False)
        loss.backward()
        self.optimizer.step()
        result: Tensor = loss.detach()
        return result

    def state(self) -> tuple[Tensor, ...]:
        weight = self.model.token_embedding_table.weight
        return weight.detach(), *self.optimizer.state[weight].values()


def captured(run: Callable[[], Tensor], generator: torch.Generator) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Captures `run`, which has run before: the graph, and the result that each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def test_a_captured_training_step_continues_the_run() -> None:
    trainers = [Trainer(), Trainer()]
    expected = torch.stack([trainers[0].step() for _ in range(9)])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = [trainers[1].step() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    trainers[1].optimizer.zero_grad()
    graph, loss = captured(trainers[1].step, trainers[1].generator)
    for _ in range(6):
        graph.replay()
        losses.append(loss.clone())
    assert torch.equal(torch.stack(losses), expected)
    for actual, eager in zip(trainers[1].state(), trainers[0].state(), strict=True):
        assert torch.equal(actual, eager)
    assert int(trainers[1].optimizer.state_dict()["state"][0]["step"]) == 9


@pytest.mark.parametrize("num_chains", [1, 300])
@pytest.mark.parametrize("num_tokens", [5, 20_000])
def test_captured_draws_advance_the_generator(num_chains: int, num_tokens: int) -> None:
    weight, probs = torch.randn(65, 65, device=GPU), torch.rand(300, 65, device=GPU)
    idx = torch.zeros((num_chains, 1), dtype=torch.long, device=GPU)

    def draw(generator: torch.Generator) -> Tensor:
        tokens = functional.generate(idx, weight, num_tokens, generator=generator)
        return torch.cat((tokens.flatten(), functional.multinomial(probs, 3, generator=generator).flatten()))

    eager, replayed = seeded(GPU), seeded(GPU)
    expected = [draw(eager) for _ in range(4)]
    assert torch.equal(draw(replayed), expected[0])
    graph, result = captured(lambda: draw(replayed), replayed)
    for later in expected[1:]:
        graph.replay()
        assert torch.equal(result, later)
    assert not torch.equal(expected[1], expected[2])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_that_the_host_counts_is_not_captured() -> None:
    param = torch.nn.Parameter(torch.ones(5, device=GPU))
    param.grad = torch.ones_like(param)
    optimizer = optim.AdamW([param])
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="capturable is False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")  # torch's compiler's, about itself
def test_compiled_with_graphs() -> None:
    torch._dynamo.utils.counters.clear()
    model = BigramLanguageModel(65, device=GPU)
    weight = model.token_embedding_table.weight
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for return_logits in (False, True):
        for _ in range(5):
            idx, targets = (torch.randint(65, (32, 8), device=GPU) for _ in range(2))
            results: list[tuple[Tensor, Tensor]] = []
            for callable_model in (model, compiled):
                torch.compiler.cudagraph_mark_step_begin()
                weight.grad = None
                _logits, loss = callable_model(idx, targets, return_logits=return_logits)
                loss.backward()
                assert weight.grad is not None
                results.append((loss.detach().clone(), weight.grad.clone()))
            torch.testing.assert_close(results[1], results[0])
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# ------------------------------------------------------------------------------------------------ large offsets

LARGE = 50_257  # tokens; the table has more than 2^31 elements


def needs_gigabytes(count: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GiB of GPU memory")


def certain_followers() -> tuple[Tensor, Tensor]:
    """A bfloat16 table of logits in which exactly one token can follow each token, and these followers."""
    followers = (7 * torch.arange(LARGE, device=GPU) + 1) % LARGE
    weight = torch.full((LARGE, LARGE), float("-inf"), dtype=torch.bfloat16, device=GPU)
    weight[torch.arange(LARGE, device=GPU), followers] = 0
    return weight, followers


@pytest.mark.parametrize("sparse", [False, True])
def test_loss_of_a_large_table(sparse: bool) -> None:
    needs_gigabytes(24)
    weight = torch.empty(LARGE, LARGE, dtype=torch.bfloat16, device=GPU).normal_()
    idx = torch.tensor([0, 1, LARGE - 2, LARGE - 1], device=GPU)
    targets = idx.flip(0)
    inputs = Inputs(weight, weight, idx, targets, idx, idx)
    rows = Inputs(weight[idx], weight, torch.arange(4, device=GPU), targets, idx, idx)
    loss, gradient = loss_and_gradient(inputs, sparse=sparse)
    expected_loss, expected = loss_and_gradient(rows)
    torch.testing.assert_close(loss, expected_loss)
    if sparse:
        assert torch.equal(gradient.coalesce().indices()[0], idx)
        torch.testing.assert_close(gradient.coalesce().values(), expected)
    else:
        torch.testing.assert_close(gradient[idx], expected)
        assert gradient[2 : LARGE - 2].count_nonzero() == 0


@pytest.mark.parametrize("num_tokens", [10, 3000])
@pytest.mark.parametrize("num_chains", [2, 1000])
def test_chains_in_a_large_table(num_tokens: int, num_chains: int) -> None:
    needs_gigabytes(40)
    weight, followers = certain_followers()
    tokens = [torch.arange(LARGE - num_chains, LARGE, device=GPU)]
    for _ in range(num_tokens):
        tokens.append(followers[tokens[-1]])
    actual = functional.generate(tokens[0][:, None], weight, num_tokens, generator=seeded())
    assert torch.equal(actual, torch.stack(tokens, dim=1))


@pytest.mark.parametrize(("num_samples", "replacement"), [(1, False), (2, False), (3, True)])
def test_samples_of_many_large_rows(num_samples: int, replacement: bool) -> None:
    needs_gigabytes(40)
    weight, followers = certain_followers()
    samples = functional.multinomial(weight.exp_(), num_samples, replacement, generator=seeded())
    assert torch.equal(samples[:, 0], followers)
    if replacement:
        assert torch.equal(samples, followers[:, None].expand(-1, 3))


def test_counts_of_a_large_vocabulary() -> None:
    needs_gigabytes(50)
    tokens = torch.tensor([LARGE - 1, LARGE - 1, LARGE - 1, LARGE - 2, 0, LARGE - 1], device=GPU)
    counts = functional.count_bigrams(tokens, LARGE)
    assert counts.sum() == 5
    assert counts[LARGE - 1, LARGE - 1] == 2
    assert counts[LARGE - 1, LARGE - 2] == counts[LARGE - 2, 0] == counts[0, LARGE - 1] == 1


def test_batches_of_a_long_text() -> None:
    needs_gigabytes(8)
    length, chunk = 3 * 2**30, 2**26
    tokens = torch.empty(length, dtype=torch.uint8, device=GPU)
    for begin in range(0, length, chunk):
        tokens[begin : begin + chunk] = torch.arange(begin, begin + chunk, device=GPU) % 251
    starts = torch.randint(length - 8, (1000,), generator=seeded())
    idx, targets = data.get_batch(tokens, 1000, 8, generator=seeded())
    assert torch.equal(idx.cpu(), (starts[:, None] + torch.arange(8)) % 251)
    assert torch.equal(targets.cpu(), (starts[:, None] + torch.arange(1, 9)) % 251)
    idx, targets = data.get_batch(tokens, 1000, 8, generator=seeded(GPU))
    assert torch.equal((idx + 1) % 251, targets)


def test_a_step_of_many_elements() -> None:
    needs_gigabytes(40)
    tensors = [torch.rand(2**31 + 5, device=GPU) for _ in range(4)]
    ends = [tensor[-9:].clone() for tensor in tensors]
    functional.adamw_(*tensors, step=torch.tensor(3.0), **HYPERPARAMETERS)
    reference.adamw_(*ends, step=torch.tensor(3.0), **HYPERPARAMETERS)
    torch.testing.assert_close([tensor[-9:] for tensor in tensors], ends)


# ---------------------------------------------------------------------------------------------------- assertions


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("embedding_cross_entropy", "embedding_cross_entropy(token + 5, table, token)"),
        ("embedding_cross_entropy", "embedding_cross_entropy(token, table, token - 1)"),
        ("count_bigrams", "count_bigrams(torch.cat((token, token + 5)), 5)"),
        ("generate", "generate(token[None] + 5, table, 3)"),
        ("generate", "generate(token[None], table + float('nan'), 3)"),
        ("multinomial", "multinomial(table - 1, 1)"),
        ("multinomial", "multinomial(table, 1)"),
    ],
)
def test_illegal_input_ends_the_process_and_names_the_op(op: str, call: str) -> None:
    script = f"""
import torch
from bigramx import functional
token, table = torch.zeros(1, dtype=torch.long, device="cuda"), torch.zeros(5, 5, device="cuda")
functional.{call}
torch.cuda.synchronize()
"""
    result = processes.run([sys.executable, "-c", script])
    assert result.returncode != 0
    assert f"Assertion `{op}: " in result.stdout + result.stderr


# -------------------------------------------------------------------------------------------- under the sanitizer


@pytest.mark.parametrize("vocab_size", [7, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"sparse": True}, {"label_smoothing": 0.1}], ids=str)
def test_sanitize_embedding_cross_entropy(vocab_size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_same(
        loss_and_gradient(Inputs.make(GPU, vocab_size, dtype), **options),
        loss_and_gradient(Inputs.make(CPU, vocab_size, dtype), **options),
    )


@pytest.mark.parametrize(("num_chains", "num_tokens"), [(1, 3000), (40, 20)])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5, "top_k": 5}, {"temperature": 0.0}, {"stop": 0}], ids=str)
def test_sanitize_generate(num_chains: int, num_tokens: int, filters: dict[str, Any]) -> None:
    weight, idx = torch.randn(65, 65), torch.randint(65, (num_chains, 2))
    expected = functional.generate(idx, weight, num_tokens, sampler="philox", generator=seeded(), **filters)
    actual = functional.generate(idx.to(GPU), weight.to(GPU), num_tokens, generator=seeded(), **filters)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("vocab_size", [7, 65, 3000])
@pytest.mark.parametrize(("num_samples", "replacement"), [(1, False), (5, False), (5, True)])
def test_sanitize_multinomial(vocab_size: int, num_samples: int, replacement: bool) -> None:
    probs = torch.rand(9, vocab_size)
    expected = functional.multinomial(probs, num_samples, replacement, sampler="philox", generator=seeded())
    actual = functional.multinomial(probs.to(GPU), num_samples, replacement, generator=seeded())
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 200])
def test_sanitize_count_bigrams(dtype: torch.dtype, vocab_size: int) -> None:
    tokens = torch.randint(vocab_size, (5001,)).to(dtype)
    actual = functional.count_bigrams(tokens.to(GPU), vocab_size)
    assert torch.equal(actual.cpu(), reference.count_bigrams(tokens, vocab_size))


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
def test_sanitize_get_batch(dtype: torch.dtype) -> None:
    tokens = torch.randint(200, (900,)).to(dtype)
    expected = data.get_batch(tokens, 500, 9, generator=seeded())
    assert_same(data.get_batch(tokens.to(GPU), 500, 9, generator=seeded()), expected)
    data.get_batch(tokens.to(GPU), 500, 9, generator=seeded(GPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_sanitize_adamw(dtype: torch.dtype, offset: int) -> None:
    param = torch.nn.Parameter(torch.rand(1000 + offset, dtype=dtype, device=GPU)[offset:])
    copy = torch.nn.Parameter(param.detach().clone())
    for one, optimizer_class in ((param, optim.AdamW), (copy, torch.optim.AdamW)):
        one.grad = torch.arange(1000, dtype=dtype, device=GPU)
        optimizer_class([one], capturable=True, amsgrad=True).step()
    torch.testing.assert_close(param, copy)
