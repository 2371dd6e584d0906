"""Beam search by the book: one hypothesis after another in plain lists, with no cache, no batch and no streaming."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagefork.scheduler.search_params import BeamSearchParams

Logps = Callable[[list[int]], NDArray[np.float32]]  # of the next token, by the tokens generated so far; -inf: impossible


class Hypothesis(NamedTuple):
    """Generated tokens and their score."""

    score: np.float32
    tokens: list[int]


class _Group:
    def __init__(self) -> None:
        self.beams = [Hypothesis(np.float32(0), [])]
        self.pool: list[Hypothesis] = []
        self.done = False


def beam_search(
    logps: Logps,
    params: BeamSearchParams,
    ends: frozenset[int],
    stops: Callable[[list[int]], bool] = lambda _: False,
    watch: Callable[[list[list[int]]], None] = lambda _: None,
) -> list[Hypothesis]:
    """The n best, or fewer if there are no more. `stops` are text rules: whether tokens complete a stop text.

    `watch` gets the tokens of everything that runs or is finished, after each step.
    """
    groups = [_Group() for _ in range(params.num_beam_groups)]
    length = 0
    while not all(group.done for group in groups):
        length += 1
        taken: list[int] = []
        for group in groups:
            if not group.done:
                taken += _step(group, logps, params, ends, stops, length, taken)
        watch([tokens for group in groups for _, tokens in group.pool + ([] if group.done else group.beams)])
    pools = [hypothesis for group in groups for hypothesis in group.pool]
    return sorted(pools, key=lambda hypothesis: -hypothesis.score)[: params.n]


def _step(
    group: _Group,
    logps: Logps,
    params: BeamSearchParams,
    ends: frozenset[int],
    stops: Callable[[list[int]], bool],
    length: int,
    taken: list[int],
) -> list[int]:
    """One step of a group; the tokens that its beams go on with."""
    width, limit = params.beam_width // params.num_beam_groups, params.max_tokens
    assert limit is not None
    candidates = []
    for rank, beam in enumerate(group.beams):
        for token, logp in enumerate(logps(beam.tokens)):
            if logp > -np.inf:
                score = beam.score + logp - np.float32(params.diversity_penalty) * np.float32(taken.count(token))
                candidates.append((-score, rank, token))
    candidates = sorted(candidates)[: max(2, 1 + len(ends)) * width]
    running: list[Hypothesis] = []
    chosen: list[int] = []
    for place, (negative, rank, token) in enumerate(candidates):
        tokens = [*group.beams[rank].tokens, token]
        stopped = token in ends or (stops(tokens) and length >= params.min_tokens)
        if not stopped and len(chosen) < width:
            chosen.append(token)
            running += [Hypothesis(-negative, tokens)] if length < limit else []
        if place < width and (stopped or length == limit):
            group.pool.append(Hypothesis(-negative / np.float32(length**params.length_penalty), tokens))
    group.pool = sorted(group.pool, key=lambda hypothesis: -hypothesis.score)[:width]
    group.beams = running
    full = len(group.pool) == width
    early = params.early_stopping if params.beam_width > 1 else True
    horizon = limit if early == "never" and params.length_penalty > 0 else length
    hope = running[0].score / np.float32(horizon**params.length_penalty) if running else -np.inf
    group.done = not running or (full and (early is True or bool(hope <= group.pool[-1].score)))
    return chosen
