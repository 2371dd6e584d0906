"""One set of parameters per decoding strategy, for tests that run all of them; and prompts that make them repeat themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagefork import BeamSearchParams, ContrastiveSearchParams, MCTSParams, SamplingParams
from pagefork.scheduler.params import CommonParams

Make = Callable[..., CommonParams]


def _made(kind: type[CommonParams], **own: Any) -> Make:
    """`kind` with these fields, and further ones that win."""
    return lambda **fields: kind(**{"max_tokens": 14, "ignore_eos": True, **own, **fields})


STRATEGIES: dict[str, Make] = {
    "greedy": _made(SamplingParams, temperature=0),
    "sampling": _made(SamplingParams, seed=1),
    "n": _made(SamplingParams, n=3, top_p=0.9, seed=2),
    "best_of": _made(SamplingParams, n=2, best_of=4, temperature=0.7, seed=3),
    "beam": _made(BeamSearchParams, beam_width=4, n=2),
    "diverse beam": _made(BeamSearchParams, beam_width=4, num_beam_groups=2, diversity_penalty=0.7, n=3),
    "contrastive": _made(ContrastiveSearchParams, top_k=4, alpha=0.5),
    "MCTS": _made(MCTSParams, num_simulations=8, leaf_batch_size=3, top_k=4),
    "MCTS, rollouts": _made(
        MCTSParams, num_simulations=5, leaf_batch_size=2, top_k=3, rollout_tokens=2, n=2, visit_temperature=1.0, seed=4
    ),
}
PROMPTS = [
    "import os\nimport sys\n\n\ndef read(path):\n    with open(path) as f:\n        return f.read()\n\n\ndef write(path):\n    ",
    "class Node:\n    def __init__(self, name, parent=None):\n        self.name = name\n        self.parent = parent\n\n    def ",
    "import re\nimport os\nimport sys\nimport json\nimport time\nimport errno\nimport types\nimport socket\nimport ",
]
