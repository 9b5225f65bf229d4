"""The bigram language model for PyTorch, as fused C++ kernels."""

from bigramx import data, functional, memory, optim, reference, tokenizer
from bigramx.counts import BigramCounts
from bigramx.evaluation import Evaluation, evaluate, optimal_loss
from bigramx.history import History
from bigramx.model import BigramLanguageModel
from bigramx.ops import build_info
from bigramx.smoothed_model import SmoothedBigramModel
from bigramx.tokenizer import CharTokenizer
from bigramx.training import fit

__version__ = "0.1.0"

__all__ = [
    "BigramCounts",
    "BigramLanguageModel",
    "CharTokenizer",
    "Evaluation",
    "History",
    "SmoothedBigramModel",
    "build_info",
    "data",
    "evaluate",
    "fit",
    "functional",
    "memory",
    "optim",
    "optimal_loss",
    "reference",
    "tokenizer",
]
