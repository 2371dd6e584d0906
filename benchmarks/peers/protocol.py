"""How a peer is driven: a process of its own that answers lines of JSON on stdin by lines of JSON on stdout.

It first says {"ready": {...}} with its versions and settings, or {"error": "..."}. Then every line in is a load, with a
field `warm` when it only prepares for it, and every line out is {"seconds": s, "tokens": n} or {"error": "..."}. Between
two lines the process sleeps. It ends with its stdin. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

FIRST, LAST = 10, 16000  # token ids of prompts: no special ones, and in every vocabulary
TOP_P = 0.95
TOP_K = 40  # where a peer needs one beside top_p
WARM_TOKENS = 4


class Load(NamedTuple):
    """So many prompts of `input` random tokens, each grows by `output` tokens, end tokens ignored.

    They are sampled, or the best of a beam search of width `beam` where one is given.
    """

    prompts: int
    input: int
    output: int
    beam: int | None = None
    seed: int = 0

    def token_ids(self) -> list[list[int]]:
        draw = np.random.default_rng(self.seed)
        ids: list[list[int]] = draw.integers(FIRST, LAST, (self.prompts, self.input)).tolist()
        return ids


class Unsupported(Exception):
    """The peer can't do this at all: it does not count as a failure."""


class Peer(Protocol):
    """A loaded model."""

    settings: str  # what a reader of the result should know of it

    def prepare(self, load: Load) -> Callable[[], int]:
        """A function that does the load and returns how many tokens it generated; only that is timed.

        Raises Unsupported.
        """


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def converted(folder: Path, name: str, convert: Callable[[Path], None]) -> Path:
    """The path of a converted model, made on the first call; `convert` writes it to the path that it is given."""
    path = folder / name
    if not path.exists():
        draft = folder / f"draft-{os.getpid()}-{name}"
        convert(draft)
        draft.rename(path)
    return path


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Does a load of one line, or says why not."""
    warm = request.pop("warm", False)
    load = Load(**request)
    if warm:
        load = load._replace(output=min(load.output, WARM_TOKENS))
    try:
        run = peer.prepare(load)
        begin = time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - begin
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception as error:  # noqa: BLE001  # a peer may raise anything; the others go on
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if tokens != load.prompts * load.output:
        return {"error": f"{tokens} tokens instead of {load.prompts * load.output}"}
    return {"seconds": seconds, "tokens": tokens}


def serve(start: Callable[[], tuple[Peer, dict[str, str]]]) -> None:
    """Answers until stdin ends. `start` loads the model and returns it with the versions of what it runs on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        peer, found = start()
    except Exception as error:  # noqa: BLE001  # told like any other failure
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=out)
        return
    print(json.dumps({"ready": {"versions": found, "settings": peer.settings}}), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), file=out)
