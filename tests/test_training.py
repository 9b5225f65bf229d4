"""fit and its history."""

from __future__ import annotations

import copy
import math
import signal
import threading
from pathlib import Path

import pytest
import torch

from bigramx import BigramLanguageModel, CharTokenizer, History, data, fit, reference
from tests.devices import on_device

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, int]:
    text = data.default_text()
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer.encode(text), tokenizer.vocab_size


def test_reaches_the_optimum_of_a_corpus(corpus: tuple[torch.Tensor, int]) -> None:
    tokens, vocab_size = corpus  # on the CPU, wherever the model is
    train_tokens, val_tokens = data.split(tokens)
    model = BigramLanguageModel(vocab_size)
    history = fit(model, train_tokens, val_tokens)
    assert history.optimum <= history.train_losses[-1] <= 1.02 * history.optimum
    assert history.steps == list(range(0, 3001, 300))
    assert len(history.train_losses) == len(history.val_losses) == 11
    assert len(history.losses) == history.step == 3000
    assert history.train_losses[-1] == model.evaluate(train_tokens)


def test_equals_the_lectures_loop(corpus: tuple[torch.Tensor, int]) -> None:
    tokens, vocab_size = on_device(corpus[0]), corpus[1]
    torch.manual_seed(3)
    model = BigramLanguageModel(vocab_size)
    history = fit(model, tokens, batch_size=4, max_steps=50, eval_interval=50)
    torch.manual_seed(3)
    lectures = reference.BigramLanguageModel(vocab_size)
    optimizer = torch.optim.AdamW(lectures.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        _logits, loss = lectures(*data.get_batch(tokens, 4, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(model.state_dict(), lectures.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_resumed_runs_equal_one(tmp_path: Path, sparse: bool, through_file: bool) -> None:
    tokens = torch.randint(20, (500,))

    def new_model() -> BigramLanguageModel:
        torch.manual_seed(5)
        return BigramLanguageModel(20, sparse=sparse)

    whole_model, model = new_model(), new_model()
    whole = fit(whole_model, tokens, tokens, max_steps=30, eval_interval=10, generator=torch.Generator().manual_seed(1))
    half = fit(model, tokens, tokens, max_steps=17, eval_interval=10, generator=torch.Generator().manual_seed(1))
    if through_file:
        half.save(tmp_path / "history.safetensors")
        half = History.load(tmp_path / "history.safetensors")
    resumed = fit(model, tokens, tokens, max_steps=30, eval_interval=10, generator=torch.Generator(), resume=half)
    assert resumed.losses == whole.losses
    assert resumed.steps == [0, 10, 17, 20, 30]
    assert resumed.train_losses[-1] == whole.train_losses[-1]
    assert torch.equal(model.token_embedding_table.weight, whole_model.token_embedding_table.weight)


def test_interrupt_keeps_the_model_and_the_history() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)

    def interrupt(history: History) -> None:
        if history.step == 7:
            raise KeyboardInterrupt

    history = fit(model, tokens, max_steps=30, eval_interval=7, on_progress=interrupt)
    assert history.interrupted
    assert history.step == 7
    assert model.evaluate(tokens) < history.train_losses[0]
    resumed = fit(model, tokens, max_steps=30, resume=history)
    assert resumed.step == 30
    assert not resumed.interrupted


@pytest.mark.cpu_only
def test_runs_resumed_after_ctrl_c_at_any_moment_equal_one(keyboard_interrupt: None) -> None:
    tokens = torch.randint(20, (500,))

    def run(history: History | None, interrupt_after: float | None) -> tuple[History, torch.Tensor]:
        torch.manual_seed(5)
        model = BigramLanguageModel(20) if history is None else models[-1]
        models.append(model)
        timer = threading.Timer(interrupt_after or 0, signal.raise_signal, [signal.SIGINT])

        def on_evaluation(history: History) -> None:
            if interrupt_after is not None and history.step == 0:
                timer.start()

        generator = torch.Generator().manual_seed(1)
        history = fit(
            model,
            tokens,
            max_steps=100_000,
            eval_interval=500,
            generator=generator,
            resume=history,
            on_evaluation=on_evaluation,
        )
        timer.cancel()
        return history, model.token_embedding_table.weight.detach().clone()

    models: list[BigramLanguageModel] = []
    whole, expected = run(None, None)
    for interrupt_after in (0.001, 0.004, 0.013, 0.03):
        history, _weight = run(None, interrupt_after)
        assert history.interrupted
        assert 0 < history.step < 100_000
        history, weight = run(history, None)
        assert history.losses == whole.losses
        assert torch.equal(weight, expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_checks_that_the_history_belongs_to_the_model() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)
    history = fit(model, tokens, max_steps=3)
    kept = copy.deepcopy(history)
    fit(model, tokens, max_steps=5, resume=history)
    assert history.losses == kept.losses
    with pytest.raises(ValueError, match="its run ended with another table"):
        fit(model, tokens, max_steps=5, resume=history)
    sparse = BigramLanguageModel(20, sparse=True)
    sparse.load_state_dict(model.state_dict())
    history = fit(model, tokens, max_steps=3)
    sparse.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="the history's optimizer is not SparseAdam"):
        fit(sparse, tokens, max_steps=5, resume=history)


def test_another_learning_rate_and_validation_on_resume() -> None:
    tokens = torch.randint(20, (500,))
    model = BigramLanguageModel(20)
    history = fit(model, tokens, max_steps=4, eval_interval=2)
    before = model.token_embedding_table.weight.detach().clone()
    history = fit(model, tokens, tokens, max_steps=8, eval_interval=2, lr=0.0, resume=history)
    assert torch.equal(model.token_embedding_table.weight, before)
    assert len(history.steps) == len(history.train_losses) == len(history.val_losses) == 5
    assert [math.isnan(loss) for loss in history.val_losses] == [True] * 3 + [False] * 2


def test_evaluations_are_reported() -> None:
    tokens, reported = torch.randint(20, (500,)), []
    fit(BigramLanguageModel(20), tokens, max_steps=5, eval_interval=2, on_evaluation=lambda h: reported.append(h.step))
    assert reported == [0, 2, 4, 5]


def test_no_steps() -> None:
    history = fit(BigramLanguageModel(20), torch.randint(20, (50,)), max_steps=0)
    assert history.steps == [0]
    assert history.losses == []


def test_bad_arguments() -> None:
    model, tokens = BigramLanguageModel(20), torch.randint(20, (500,))
    with pytest.raises(ValueError, match="eval_interval >= 1, got 3000 and 0"):
        fit(model, tokens, eval_interval=0)
    with pytest.raises(ValueError, match="more than block_size = 8 tokens, got 5"):
        fit(model, tokens[:5])


def test_tokens_out_of_range() -> None:
    with pytest.raises(IndexError, match="tokens holds 20 at position 0, expected 0 <= token < 20"):
        fit(BigramLanguageModel(20), torch.full((50,), 20))


def test_history_files_of_another_kind(tmp_path: Path) -> None:
    BigramLanguageModel(2).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a history"):
        History.load(tmp_path / "model.safetensors")
