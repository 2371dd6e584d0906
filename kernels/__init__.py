"""Kernels: the operations of one step on tensors. They import nothing else of Pagefork and raise ValueError.

The stages of the logits pipeline are exported here, in the order in which they apply; the others by their module.
"""

from .bans import allow_tokens, ban_tokens, ban_words
from .filters import apply_min_p, apply_temperature, apply_top_k, apply_top_p
from .logit_bias import apply_logit_bias
from .ngram import ban_repeated_ngrams
from .penalties import apply_penalties
from .sample import sample
from .top_logprobs import top_logprobs

__all__ = [
    "allow_tokens",
    "apply_logit_bias",
    "apply_min_p",
    "apply_penalties",
    "apply_temperature",
    "apply_top_k",
    "apply_top_p",
    "ban_repeated_ngrams",
    "ban_tokens",
    "ban_words",
    "sample",
    "top_logprobs",
]
