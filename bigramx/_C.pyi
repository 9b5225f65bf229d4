import torch
from torch import Tensor

class Alphabet:
    def __init__(self, characters: str) -> None: ...
    def encode(self, text: str) -> Tensor: ...
    def decode(self, tokens: Tensor) -> str: ...
    def decode_sequence(self, tokens: list[int] | tuple[int, ...]) -> str | None: ...

def build_info() -> dict[str, str]: ...
def count_and_step_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None: ...
def embedding_cross_entropy(
    idx: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    padding_idx: int,
    sparse: bool,
    return_logits: bool,
) -> tuple[Tensor, Tensor]: ...
def get_batch(
    tokens: Tensor, batch_size: int, block_size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]: ...
