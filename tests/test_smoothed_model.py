"""SmoothedBigramModel: the face of BigramLanguageModel over sparse counts."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigramx import (
    BigramCounts,
    BigramLanguageModel,
    CharTokenizer,
    SmoothedBigramModel,
    data,
    evaluate,
    functional,
    memory,
    reference,
)
from bigramx.smoothed_model import Method
from bigramx.storage import write_tensors

pytestmark = pytest.mark.cpu_only

V = 50
METHODS: list[tuple[Any, dict[str, Any]]] = [
    ("kneser-ney", {}),
    ("kneser-ney", {"discount": 0.5, "uniform_weight": 0.1}),
    ("witten-bell", {}),
    ("absolute-discounting", {"discount": 0.6}),
    ("jelinek-mercer", {"weight": 0.7}),
    ("add-k", {"smoothing": 0.1}),
]


def tokens_of(seed: int, num_tokens: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, V - 2) ** 1.1
    tokens = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    tokens[1::2] = (tokens[::2] * 7 + tokens[1::2]) % (V - 3)
    return tokens


def some_model(method: Any = "kneser-ney", **options: Any) -> SmoothedBigramModel:
    counts = BigramCounts(V)
    counts.update(tokens_of(1))
    return SmoothedBigramModel.from_counts(counts, method, **options)


def probs_of(model: SmoothedBigramModel) -> Tensor:
    """(V, V) float64."""
    rows = torch.arange(V).repeat_interleave(model.crow_indices.diff())
    own = torch.zeros(V, V, dtype=torch.float64)
    own[rows, model.col_indices.long()] = model.pair_probs.double()
    return own + model.backoff.double()[:, None] * model.unigram.double()


@pytest.fixture(params=METHODS, ids=lambda param: f"{param[0]}-{'-'.join(param[1])}")
def model(request: pytest.FixtureRequest) -> SmoothedBigramModel:
    method, options = request.param
    return some_model(method, **options)


# ------------------------------------------------------------------------------------------------------- from_counts


@pytest.mark.parametrize("layout", ["dense", "csr", "coo", "int32", "counts"])
def test_from_counts_of_any_layout(layout: str) -> None:
    counts = BigramCounts(V)
    counts.update(tokens_of(1))
    dense = counts.to_dense()
    given = {
        "dense": dense,
        "csr": counts.to_csr(),
        "coo": dense.to_sparse_coo(),
        "int32": dense.int(),
        "counts": counts,
    }
    model = SmoothedBigramModel.from_counts(given[layout])
    for made, expected in zip(model._parts(), some_model()._parts(), strict=True):
        assert torch.equal(made, expected)
    assert (model.vocab_size, model.num_distinct, model.method) == (V, int((dense > 0).sum()), "kneser-ney")
    assert model.col_indices.dtype == torch.int32
    assert repr(model) == f"SmoothedBigramModel({V}, num_distinct={model.num_distinct}, method='kneser-ney')"


def test_held_out_of_any_form() -> None:
    held_out = BigramCounts(V)
    held_out.update(tokens_of(2))
    shards = data.TokenShards([tokens_of(2)])
    models = [
        some_model("jelinek-mercer", held_out=given)
        for given in (held_out, held_out.to_csr(), held_out.to_dense(), tokens_of(2), shards)
    ]
    for model in models[1:]:
        assert torch.equal(model.backoff, models[0].backoff)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "expected method to be one of kneser-ney, .*got 'kn'", (torch.eye(3).long(), "kn"), {}),
        (
            ValueError,
            "add-k takes no discount and no weight",
            (torch.eye(3).long(), "add-k"),
            {"discount": 1, "weight": 1},
        ),
        (ValueError, "witten-bell takes no smoothing", (torch.eye(3).long(), "witten-bell"), {"smoothing": 1}),
        (ValueError, "expected a weight, or held_out", (torch.eye(3).long(), "jelinek-mercer"), {}),
        (RuntimeError, "square", (torch.zeros(2, 3).long(),), {}),
        (TypeError, "integers, got torch.float32", (torch.eye(3),), {}),
        (ValueError, ">= 0", (-torch.eye(3).long(),), {}),
        (
            RuntimeError,
            r"V = 3, got \(4, 4\)",
            (torch.eye(3).long(), "jelinek-mercer"),
            {"held_out": torch.eye(4).long()},
        ),
    ],
)
def test_from_counts_that_make_no_model(
    error: type[Exception], match: str, arguments: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        SmoothedBigramModel.from_counts(*arguments, **options)


def test_kneser_ney_is_the_best_on_held_out_tokens() -> None:
    """Of a text whose last tenth none of them has seen, by characters and by pairs of them."""
    text = data.default_text()
    others: tuple[Method, ...] = ("witten-bell", "absolute-discounting", "add-k")
    for width in (1, 2):
        pieces = ["".join(piece) for piece in zip(*[iter(text)] * width, strict=False)]
        numbers = {piece: number for number, piece in enumerate(sorted(set(pieces)))}
        tokens = torch.tensor([numbers[piece] for piece in pieces])
        train, val = data.split(tokens)
        counts = BigramCounts(len(numbers))
        counts.update(train)
        all_methods: list[tuple[Method, dict[str, Any]]] = [("kneser-ney", {}), ("jelinek-mercer", {"held_out": val})]
        all_methods += [(method, {}) for method in others]
        losses = {
            method: SmoothedBigramModel.from_counts(counts, method, **options).evaluate(val)
            for method, options in all_methods
        }
        assert min(losses, key=losses.__getitem__) == "kneser-ney", losses


# ----------------------------------------------------------------------------------------------------------- forward


def test_forward(model: SmoothedBigramModel) -> None:
    idx, targets = torch.randint(V, (3, 5)), torch.randint(V, (3, 5))
    logits, no_loss = model(idx)
    assert no_loss is None
    assert logits.shape == (3, 5, V)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double().exp(), probs_of(model)[idx], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(3, 5), rtol=0, atol=1e-6)
    flat, loss = model(idx, targets)
    assert torch.equal(flat, logits.view(15, V))
    torch.testing.assert_close(loss, F.cross_entropy(flat, targets.view(-1)))
    assert loss.dtype == torch.float32
    none, same_loss = model(idx, targets, return_logits=False)
    assert none is None
    assert torch.equal(same_loss, loss)
    assert torch.equal(model.loss(idx, targets), loss)
    torch.testing.assert_close(model.log_probs(idx, targets).mean(), -loss)
    assert model.log_probs(idx.int(), targets.view(-1)).shape == (3, 5)


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 0, 3), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    model = some_model()
    idx, targets = torch.randint(V, shape), torch.randint(V, shape)
    assert model(idx)[0].shape == (*shape, V)
    logits, loss = model(idx, targets)
    assert logits.shape == (idx.numel(), V)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets.reshape(-1)), equal_nan=True)


def test_ignored_targets() -> None:
    model = some_model()
    idx, targets = torch.randint(V, (3, 5)), torch.randint(V, (3, 5))
    targets[1] = -100
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets.view(-1)))
    assert model.loss(idx, torch.full_like(idx, -100)).isnan()


def test_mixes_with_a_neural_model() -> None:
    prior, neural = some_model(), nn.Embedding(V, V)
    idx, targets = torch.randint(V, (3, 5)), torch.randint(V, (3, 5))
    loss = F.cross_entropy((prior(idx)[0] + neural(idx)).view(-1, V), targets.view(-1))
    loss.backward()
    assert neural.weight.grad is not None
    assert list(prior.parameters()) == []


def test_no_table_of_logits_exists() -> None:
    """8 * 10^9 logits of a vocabulary of 200,000 would take 32 GB."""
    num_tokens = vocab_size = 200_000
    model = SmoothedBigramModel(vocab_size)
    idx = torch.randint(vocab_size, (num_tokens,))
    assert model.loss(idx, idx.flip(0)).item() == pytest.approx(math.log(vocab_size))
    assert model(idx, idx, return_logits=False)[1].item() == pytest.approx(math.log(vocab_size))
    assert model.evaluate(idx) == pytest.approx(math.log(vocab_size))


@pytest.mark.parametrize("token", [-1, V, -100])
def test_tokens_out_of_range(token: int) -> None:
    model = some_model()
    idx = torch.tensor([[1, token]])
    good = torch.zeros_like(idx)
    calls: list[Callable[[], object]] = [
        lambda: model(idx),
        lambda: model(idx, good),
        lambda: model.log_probs(idx, good),
        lambda: model.generate(idx, 2),
        lambda: model.generate(idx, 2, sampler="philox"),
        lambda: model.evaluate(idx[0]),
    ]
    if token != -100:
        calls.append(lambda: model.loss(good, idx))
    for call in calls:
        with pytest.raises(IndexError, match=f"holds {token} at position 1, expected 0 <= .* < {V}"):
            call()


def test_mistakes() -> None:
    model = some_model()
    idx = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected as many targets as idx has tokens, \(2, 3\), got \(2,\)"):
        model(idx, idx[0, :2])
    with pytest.raises(RuntimeError, match="idx"):
        model(idx.float())
    with pytest.raises(RuntimeError, match="targets"):
        model(idx, idx.double())
    with pytest.raises(RuntimeError, match=f"V = {V}, got"):
        model.evaluate_counts(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected vocab_size >= 1, got 0"):
        SmoothedBigramModel(0)
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
        SmoothedBigramModel(3, dtype=torch.float16)


# -------------------------------------------------------------------------------------------------------------- module


def assert_same(model: SmoothedBigramModel, other: SmoothedBigramModel) -> None:
    for name, buffer in model.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer)
    idx = torch.randint(V, (2, 4))
    assert torch.equal(model(idx)[0], other(idx)[0])


def test_state_dict() -> None:
    model, other = some_model(), SmoothedBigramModel(V)
    assert list(model.state_dict()) == ["crow_indices", "col_indices", "pair_probs", "backoff", "unigram"]
    other.load_state_dict(model.state_dict())
    assert_same(model, other)
    other.load_state_dict(SmoothedBigramModel(V).state_dict())
    assert_same(SmoothedBigramModel(V), other)
    outer, copied = nn.Sequential(model), nn.Sequential(SmoothedBigramModel(V))
    copied.load_state_dict(outer.state_dict())
    assert torch.equal(copied(torch.tensor(3))[0], model(torch.tensor(3))[0])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_same(model, other)


def test_a_state_dict_that_makes_no_model_is_refused_whole() -> None:
    model = some_model()
    states = [SmoothedBigramModel(V + 1).state_dict(), copy.deepcopy(model.state_dict())]
    states[1]["pair_probs"][0] = 2
    for state, match in zip(states, ["expected V = 50, got 51", "expected pair_probs to be from 0 to 1"], strict=True):
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(state)
        assert_same(before, model)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[SmoothedBigramModel], SmoothedBigramModel]) -> None:
    model = some_model()
    model.tokenizer = CharTokenizer("abc")
    other = copied(model)
    assert_same(model, other)
    assert (other.method, other.tokenizer) == (model.method, model.tokenizer)


def test_dtypes() -> None:
    model = some_model()
    for dtype in (torch.float16, torch.bfloat16):
        assert_same(some_model(), copy.deepcopy(model).to(dtype))
    assert_same(some_model(), model.half().float().eval().requires_grad_(False).train())
    double = copy.deepcopy(model).double()
    assert double.unigram.dtype == double(torch.tensor(3))[0].dtype == torch.float64
    assert double.evaluate(tokens_of(2)) == model.evaluate(tokens_of(2))
    assert double.crow_indices.dtype == torch.int64
    assert double.col_indices.dtype == torch.int32


def test_on_the_meta_device() -> None:
    model = some_model().to("meta")
    idx = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert model(idx)[0].shape == (2, 3, V)
    logits, loss = model(idx, idx)
    assert (logits.shape, loss.shape, loss.is_meta) == ((6, V), (), True)
    assert model.to_empty(device="cpu").unigram.device.type == "cpu"


@pytest.mark.parametrize("method", ["kneser-ney", "absolute-discounting"])
def test_whatever_the_default_device_is(method: Any) -> None:
    tokens = torch.arange(300) % 17
    expected = SmoothedBigramModel.from_counts(functional.count_bigrams(tokens, 20), method=method)
    with torch.device("meta"):
        model = SmoothedBigramModel.from_counts(functional.count_bigrams(tokens, 20), method=method)
        evaluation = evaluate(model, tokens)
    assert evaluation == evaluate(expected, tokens)


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_compiled() -> None:
    model = some_model()
    idx, targets = torch.randint(V, (2, 3)), torch.randint(V, (2, 3))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(idx, targets)[1], model(idx, targets)[1])


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_evaluate(model: SmoothedBigramModel) -> None:
    tokens = tokens_of(2)
    losses = -probs_of(model)[tokens[:-1], tokens[1:]].log()
    assert model.evaluate(tokens) == pytest.approx(losses.mean().item(), rel=1e-12)
    counts = BigramCounts(V)
    counts.update(tokens)
    for given in (counts, counts.to_csr(), counts.to_dense()):
        assert model.evaluate_counts(given) == model.evaluate(tokens)
    shards = data.TokenShards([tokens[:700], tokens[700:]])
    expected = torch.cat((losses[:699], losses[700:])).mean().item()
    assert model.evaluate(shards) == pytest.approx(expected, rel=1e-12)
    documents = data.TokenShards([tokens], eot=2)
    assert model.evaluate(documents) == pytest.approx(losses[tokens[:-1] != 2].mean().item(), rel=1e-12)
    assert math.isnan(model.evaluate(tokens[:1]))
    assert math.isnan(model.evaluate_counts(BigramCounts(V)))


def test_unseen_pairs() -> None:
    model, tokens = some_model(), tokens_of(2)
    seen = set(itertools.pairwise(tokens_of(1).tolist()))
    unseen = sum(pair not in seen for pair in itertools.pairwise(tokens.tolist()))
    counts = BigramCounts(V)
    counts.update(tokens)
    assert model.num_unseen(counts) == unseen > 0


def test_evaluate_is_the_same_for_any_number_of_threads() -> None:
    counts, tokens = BigramCounts(3000), torch.randint(3000, (200_000,))
    counts.update(tokens[:100_000])
    model = SmoothedBigramModel.from_counts(counts)
    before, losses = torch.get_num_threads(), set()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            losses.add(model.evaluate(tokens[100_000:]))
    finally:
        torch.set_num_threads(before)
    assert len(losses) == 1


# ------------------------------------------------------------------------------------------------------------ generate


def by_the_loop(model: SmoothedBigramModel, idx: Tensor, max_new_tokens: int, generator: torch.Generator) -> Tensor:
    for _ in range(max_new_tokens):
        probs = F.softmax(model(idx)[0][:, -1], dim=-1)
        idx = torch.cat((idx, torch.multinomial(probs, 1, generator=generator)), dim=1)
    return idx


def test_the_sampler_torch_replays_the_loop(model: SmoothedBigramModel) -> None:
    idx = torch.tensor([[1, 2], [3, 49]])
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    tokens = model.generate(idx, 30, generator=generators[0])
    assert torch.equal(tokens, by_the_loop(model, idx, 30, generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1, "stop": [1, 4]}, {"temperature": 0}],
)
def test_the_sampler_philox(options: dict[str, Any]) -> None:
    model, idx = some_model(), torch.tensor([[1, 2], [3, 49]])
    tokens = model.generate(idx.int(), 40, sampler="philox", generator=torch.Generator().manual_seed(3), **options)
    expected = reference.interpolated_bigram_generate(
        idx, *model._parts(), 40, generator=torch.Generator().manual_seed(3), **options
    )
    assert torch.equal(tokens, expected)


def test_both_samplers_keep_the_same_tokens() -> None:
    model, idx = some_model(), torch.full((2000, 1), 3)
    for options in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}):
        kept = [
            set(model.generate(idx, 1, sampler=sampler, **options)[:, 1].tolist()) for sampler in ("torch", "philox")
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) < V // 2


def test_hooks_are_honoured() -> None:
    """As those of an nn.Module that changes its logits."""
    model, idx = some_model(), torch.tensor([[1]])
    model.register_forward_hook(lambda _module, _args, output: (output[0].index_fill(-1, torch.tensor(7), 1e9), None))
    for sampler in ("torch", "philox"):
        assert model.generate(idx, 5, sampler=sampler)[0, 1:].tolist() == [7] * 5


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"temperature": -1}),
        (ValueError, {"top_k": 0}),
        (ValueError, {"top_p": 1.5}),
        (ValueError, {"min_p": -1}),
        (ValueError, {"stop": V}),
        (ValueError, {"sampler": "best"}),
        (TypeError, {"top_k": "1"}),
    ],
)
def test_options_out_of_range(error: type[Exception], options: dict[str, Any]) -> None:
    for sampler in ("torch", "philox"):
        with pytest.raises(error):
            some_model().generate(torch.tensor([[0]]), 3, **{"sampler": sampler, **options})


# ------------------------------------------------------------------------------------------------------ dense and files


def test_to_dense(model: SmoothedBigramModel) -> None:
    model.tokenizer = CharTokenizer("abc")
    dense = model.to_dense()
    assert isinstance(dense, BigramLanguageModel)
    table = dense.token_embedding_table.weight
    assert table.requires_grad
    assert dense.tokenizer is model.tokenizer
    torch.testing.assert_close(table.double().softmax(1), probs_of(model), rtol=1e-5, atol=1e-12)
    assert dense.evaluate(tokens_of(2)) == pytest.approx(model.evaluate(tokens_of(2)), rel=1e-6)
    dense(torch.randint(V, (2, 3)), torch.randint(V, (2, 3)))[1].backward()


def test_to_dense_checks_the_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda _device: 4 * V * V - 1)
    with pytest.raises(MemoryError, match=r"a table with V = 50 takes 0\.0 GB, and cpu has 0\.0 GB of memory in all"):
        some_model().to_dense()


def test_save_and_load(model: SmoothedBigramModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.tokenizer = CharTokenizer("abc")
    model.save(path)
    other = SmoothedBigramModel.load(path)
    assert_same(model, other)
    assert (other.method, other.tokenizer) == (model.method, model.tokenizer)
    file = io.BytesIO()
    model.double().save(file)
    file.seek(0)
    assert_same(model, SmoothedBigramModel.load(file))


def crow_that_descends(parts: dict[str, Tensor]) -> None:
    parts["crow_indices"][3] = parts["crow_indices"][5] + 1


def columns_that_do_not_ascend(parts: dict[str, Tensor]) -> None:
    parts["col_indices"][:2] = parts["col_indices"][:2].flip(0)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda parts: parts.pop("backoff"), "expected the tensors"),
    "another": (lambda parts: parts.update(more=torch.zeros(1)), "expected the tensors"),
    "dtype": (lambda parts: parts.update(unigram=parts["unigram"].half()), "expected .* of dtype torch.float32"),
    "mixed dtypes": (lambda parts: parts.update(unigram=parts["unigram"].double()), "of dtype torch.float64"),
    "columns of int64": (lambda parts: parts.update(col_indices=parts["col_indices"].long()), "of dtype torch.int32"),
    "dims": (lambda parts: parts.update(unigram=parts["unigram"][None]), "to be 1-D"),
    "no tokens": (
        lambda parts: parts.update({name: part[:0] for name, part in parts.items()}),
        "expected crow_indices, backoff and unigram of",
    ),
    "sizes": (
        lambda parts: parts.update(backoff=parts["backoff"][1:]),
        "expected crow_indices, backoff and unigram of",
    ),
    "crow that descends": (crow_that_descends, "expected crow_indices to ascend"),
    "crow that ends late": (lambda parts: parts["crow_indices"][-1].add_(1), "expected crow_indices to ascend"),
    "crow that begins late": (lambda parts: parts["crow_indices"][0].add_(1), "expected crow_indices to ascend"),
    "pairs": (lambda parts: parts.update(pair_probs=parts["pair_probs"][1:]), "expected crow_indices to ascend"),
    "columns": (lambda parts: parts["col_indices"][4].fill_(V), "expected col_indices from 0 to V - 1"),
    "negative columns": (lambda parts: parts["col_indices"][4].fill_(-1), "expected col_indices from 0 to V - 1"),
    "columns that do not ascend": (columns_that_do_not_ascend, "expected the col_indices of a row to ascend"),
    "nan": (lambda parts: parts["pair_probs"][4].fill_(float("nan")), "expected pair_probs to be from 0 to 1"),
    "negative": (lambda parts: parts["backoff"][4].fill_(-0.1), "expected backoff to be from 0 to 1"),
    "above 1": (lambda parts: parts["unigram"][4].fill_(1.1), "expected unigram to be from 0 to 1"),
    "sums": (lambda parts: parts["pair_probs"][4].mul_(0.99), "expected the probabilities of a row to sum to 1 within"),
}


@pytest.mark.parametrize(("spoil", "match"), WRONG.values(), ids=WRONG)
def test_files_that_hold_no_model(spoil: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    parts = {name: part.clone() for name, part in some_model().state_dict().items()}
    spoil(parts)
    file = io.BytesIO()
    write_tensors(file, "smoothed-model", parts, {})
    file.seek(0)
    with pytest.raises(ValueError, match=match):
        SmoothedBigramModel.load(file)


def test_the_end_of_a_document_is_that_of_the_counts(tmp_path: Path) -> None:
    counts = BigramCounts(V, eot=2)
    counts.update(tokens_of(2))
    model = SmoothedBigramModel.from_counts(counts)
    model.save(path := tmp_path / "model.safetensors")
    assert (model.eot, SmoothedBigramModel.load(path).eot, some_model().eot) == (2, 2, None)


@pytest.mark.parametrize("eot", ["-1", "x", str(V), "9" * 30, "\u0663", ""])
def test_files_that_name_no_token(eot: str) -> None:
    file = io.BytesIO()
    write_tensors(file, "smoothed-model", some_model().state_dict(), {"eot": eot})
    file.seek(0)
    with pytest.raises(ValueError, match="expected eot to be a token"):
        SmoothedBigramModel.load(file)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    BigramLanguageModel(3).save(path)
    with pytest.raises(ValueError, match="not a smoothed-model that bigramx saved"):
        SmoothedBigramModel.load(path)
    model = SmoothedBigramModel(2)
    model.tokenizer = CharTokenizer("abc")
    with pytest.raises(ValueError, match="the tokenizer has 3 tokens, the table 2 rows"):
        model.save(path)
    assert isinstance(BigramLanguageModel.load(path), BigramLanguageModel)


def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = some_model()
    model.backoff[3] = 0.9
    with pytest.raises(ValueError, match="expected the probabilities of a row to sum to 1"):
        model.save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_take_little_memory() -> None:
    vocab_size = 128_256
    counts = BigramCounts(vocab_size)
    counts.update(torch.randint(vocab_size, (20_000,)))
    model = SmoothedBigramModel.from_counts(counts)
    assert sum(buffer.nbytes for buffer in model.buffers()) < 2_300_000
    tokens = model.generate(torch.tensor([[5]]), 1000, sampler="philox", top_p=0.9)
    assert tokens.shape == (1, 1001)
    assert functional.interpolated_bigram(tokens[:, :-1], tokens[:, 1:], *model._parts())[0].gt(0).all()
