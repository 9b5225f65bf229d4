"""Training loops and what stands in them: averages, optimizers, threads, quantisation."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.scripts import IDX, TARGETS, Model, V, alike, grads_of, loss_of, state_of

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]


def model_in(wrapper: Any) -> Model:
    return wrapper.module


@alike
def test_averaged_model(model: Model) -> object:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn([IDX], average)
    return state_of(average), average(IDX, TARGETS), model_in(average).generate(IDX, 5)


@alike
def test_data_parallel(model: Model) -> object:
    parallel = nn.DataParallel(model)
    logits, loss = parallel(IDX, TARGETS)
    loss.backward()
    return logits, loss, grads_of(parallel), model_in(parallel).generate(IDX, 5)


@alike
def test_closure_of_lbfgs(model: Model) -> object:
    model.double()  # it amplifies rounding
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return optimizer.step(closure), state_of(model)


@alike
def test_optimizers(model: Model) -> object:
    losses = []
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam):
        groups = [{"params": [param], "lr": 0.01} for param in model.parameters()]
        optimizer = kind(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
    return losses, state_of(model)


@alike
def test_optimizer_in_backward(model: Model) -> object:
    for param in model.parameters():
        optimizer = torch.optim.SGD([param], lr=1.0)
        param.register_post_accumulate_grad_hook(lambda _param, optimizer=optimizer: optimizer.step())
    loss_of(model).backward()
    return state_of(model)


@alike
def test_vector_of_parameters(model: Model) -> object:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector / 2, model.parameters())
    return vector, loss_of(model)


@alike
def test_state_dict_hooks(model: Model) -> object:
    model.register_state_dict_post_hook(lambda _module, state, _prefix, _metadata: state.update(extra=torch.ones(1)))
    return model.state_dict()


@alike
def test_quantised(model: Model) -> object:
    from torch.ao import quantization

    config = {nn.Embedding: quantization.float_qparams_weight_only_qconfig}
    small = quantization.quantize_dynamic(model, config)
    logits, loss = small(IDX, TARGETS)
    torch.manual_seed(2)
    return logits, loss, small.generate(IDX, 10)


@alike
def test_fake_quantised(model: Model) -> object:
    """Quantisation-aware training by a forward hook."""
    fake = torch.ao.quantization.FakeQuantize()
    model.token_embedding_table.register_forward_hook(lambda _module, _args, output: fake(output))
    loss = loss_of(model)
    loss.backward()
    return loss, grads_of(model)


@alike
def test_in_threads(model: Model) -> object:
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        results[number] = loss_of(model)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(results.values()).backward()  # type: ignore[union-attr]
    return sorted(results.items()), grads_of(model)


@alike
def test_other_shapes(model: Model) -> object:
    results = []
    for idx in (IDX[:1], IDX[:, :1], IDX[:0], IDX.T.contiguous().T[:2], IDX[:, ::2].contiguous()):
        logits, loss = model(idx, idx.contiguous())
        results.append((logits, loss))
    return results


@alike
def test_ignored_targets(model: Model) -> object:
    targets = TARGETS.clone()
    targets[0] = -100
    logits, loss = model(IDX, targets)
    loss.backward()
    _logits, nan = model(IDX, torch.full_like(IDX, -100))
    return logits, loss, nan, grads_of(model)


@alike
def test_sparse_table(model: Model) -> object:
    table = nn.Embedding(V, V, sparse=True)
    model.token_embedding_table = table
    optimizer = torch.optim.SparseAdam([table.weight], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert table.weight.grad is not None
    return table.weight.grad.is_sparse, state_of(model)


@alike
def test_modes(model: Model) -> object:
    model.eval()
    model.train()
    return model.training, [module.training for module in model.modules()], loss_of(model)


@alike
def test_module_lists(model: Model) -> object:
    return [name for name, _module in model.named_modules()], [name for name, _param in model.named_parameters()]


@alike
def test_repr_of_the_model(model: Model) -> object:
    return repr(model)
