from collections.abc import Callable

from torch import Tensor

class Alphabet:
    def __init__(self, characters: str) -> None: ...
    def encode(self, text: str) -> Tensor: ...
    def decode(self, tokens: Tensor) -> str: ...
    def decode_sequence(self, tokens: list[int] | tuple[int, ...]) -> str | None: ...

# Of the tensors of one parameter, by position: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step.
adamw_fits: Callable[..., bool]
adamw_step: Callable[..., None]

def build_info() -> dict[str, str]: ...

# The ops, with the arguments of their schemas (csrc/bindings.cpp), by position.
adamw_: Callable[..., None]
count_bigrams: Callable[..., Tensor]
embedding_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
fit_: Callable[..., int]
generate: Callable[..., Tensor]
get_batch: Callable[..., tuple[Tensor, Tensor]]
interpolated_bigram: Callable[..., tuple[Tensor, Tensor]]
interpolated_bigram_generate: Callable[..., Tensor]
multinomial: Callable[..., Tensor]
