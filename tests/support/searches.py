"""Searches as `pagefork explain --json` prints them, made up: of any size, with the texts that a page likes least."""

from __future__ import annotations

import random
from typing import Any

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;&amp;",
    "\"'`${alert(1)}\\",
    "\u2028\u2029\x00\x1b[2J\r",
    "\ud800",
    "\u202eevil\u2066",
    "مرحبا עולם",
    "\n\t  ",
    "{{document}}{{policy}}",
    "",
    "https://example.com/a.png",
]


def search(strategy: str, steps: int = 12, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """The document of a search of `strategy`; sizes: `candidates` of a step, `outputs`."""
    draw = random.Random(seed)
    make = {"beam": _beam, "contrastive": _contrastive, "mcts": _mcts}[strategy]
    found, outputs = make(draw, steps, sizes.get("candidates", 8), sizes.get("outputs", 2))
    return {
        "strategy": strategy,
        "model": HOSTILE[0],
        "prompt": "".join(HOSTILE),
        "settings": {"stop": HOSTILE, "max_tokens": steps},
        "outputs": [
            {"index": index, "text": "".join(HOSTILE), "token_ids": tokens, "score": -0.5, "finish_reason": "length"}
            for index, tokens in enumerate(outputs)
        ],
        "complete": False,
        "usage": {"forward_tokens": 9, "forks": 3, "blocks_copied": 2, "blocks_freed": 1, "shared_block_ratio": 0.5},
        "texts": {str(token): text for token, text in enumerate(HOSTILE)},
        "steps": found,
    }


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(len(HOSTILE)) for _ in range(count)]


def _falling(draw: random.Random, count: int) -> list[float]:
    return sorted((draw.uniform(-6, 0) for _ in range(count)), reverse=True)


def _beam(draw: random.Random, steps: int, candidates: int, outputs: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    found: list[dict[str, Any]] = []
    for at in range(steps):
        fates = ["kept"] * (candidates // 2) + ["finished"] * (at > 2) + ["pruned"] * candidates
        found.append(
            {
                "type": "beam",
                "step": at + 1,
                "parent": [draw.randrange(candidates // 2) if at else -1 for _ in range(candidates)],
                "group": [0] * candidates,
                "token": _tokens(draw, candidates),
                "logprob": [None, *_falling(draw, candidates - 1)],
                "cumulative": _falling(draw, candidates),
                "fate": fates[:candidates],
            }
        )
    best = []
    entry = 0
    for step in reversed(found):
        best.append(step["token"][entry])
        entry = step["parent"][entry]
    return found, [best[::-1]] * outputs


def _contrastive(draw: random.Random, steps: int, candidates: int, outputs: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    found: list[dict[str, Any]] = [
        {
            "type": "contrastive",
            "token": _tokens(draw, candidates),
            "p": sorted((draw.random() for _ in range(candidates)), reverse=True),
            "similarity": [draw.uniform(-1, 1) for _ in range(candidates)],
            "score": [draw.uniform(-1, 1) for _ in range(candidates)],
            "chosen": draw.randrange(candidates),
            "alpha": 0.6,
            "confidence": draw.random(),
        }
        for _ in range(steps)
    ]
    return found, [[step["token"][step["chosen"]] for step in found]]


def _mcts(draw: random.Random, steps: int, candidates: int, outputs: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    found: list[dict[str, Any]] = []
    for at in range(steps):
        parent, visits = [-1, *[0] * candidates], [0] * (1 + candidates)
        for _ in range(2 * candidates):  # nodes below the children
            parent.append(draw.randrange(1, len(parent)))
            visits.append(1)
        for entry in reversed(range(1, len(parent))):
            visits[parent[entry]] += visits[entry]
        visits[0] += 1
        found.append(
            {
                "type": "mcts",
                "output": at % outputs,
                "parent": parent,
                "token": [-1, *_tokens(draw, len(parent) - 1)],
                "prior": [1.0, *(draw.random() for _ in parent[1:])],
                "visits": visits,
                "value": [draw.random() for _ in parent],
                "chosen": 1 + max(range(candidates), key=lambda child: visits[1 + child]),
            }
        )
    return found, [[s["token"][s["chosen"]] for s in found if s["output"] == output] for output in range(outputs)]
