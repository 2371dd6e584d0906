"""Sampling, greedy decoding, n outputs of one prompt, and best-of-n."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..group import Group
from ..params import CommonParams, SamplingParams
from ..plan import Kind
from ..request import Request
from .base import Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Read, Samples, Top, ending, register

_NO_IDS = np.empty(0, np.int32)
_NO_LOGPS = np.empty(0, np.float32)


class Candidate(NamedTuple):
    """What `rank_by` sees of a finished candidate; the higher its return value, the better."""

    token_ids: list[int]
    logprobs: list[float]
    cumulative_logprob: float
    finish_reason: str
    text: str


class _Output:
    """Tokens of one sequence, kept here as long as they are not delivered."""

    __slots__ = ("count", "ended", "logps", "score", "tokens", "tops")

    def __init__(self) -> None:
        self.count = 0  # tokens generated; those of ranked candidates are below
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.tops: list[Top] | None = None
        self.ended: tuple[str, int | str | None] | None = None
        self.score = 0.0


@register
class Sampling(Base):
    """Sequence i draws from stream i of the request's seed; all fork in the plan of the last prompt chunk."""

    params: ClassVar[type[CommonParams]] = SamplingParams
    lockstep = False
    pipelined = True

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, SamplingParams)
        self._params = request.params
        self._width = self._params.width
        self._ranked = self._params.best_of is not None
        self._index: dict[int, int] = {}
        self._reads: list[Read] = []  # of the last probe: with one sequence the next is the same
        self._outputs: list[_Output] = []  # made when the request runs: its width may still be refused
        self._delivered = 0  # ranked only: tokens that all candidates agree on were streamed already
        self._with_tops = self._params.logprobs is not None
        self._top_n = self._params.logprobs or 0
        vocab_size = request.extra.get("vocab_size", self._top_n)
        if not 0 <= self._top_n <= vocab_size:
            self._top_n = vocab_size

    def footprint(self) -> Footprint:
        """As many sequences as candidates, as many outputs as asked for."""
        return Footprint(self._width, self._params.n)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """One draw per sequence; before the first, one per candidate from the prompt's last row."""
        if self._reads and seqs == self._reads[0].at:
            return self._reads
        if self._index:
            reads = [Read(Kind.SAMPLE, seqs)]
        else:
            root = int(seqs[0])
            candidates = [root, *group.fresh(self._width - 1)] if self._width > 1 else [root]
            self._outputs = [_Output() for _ in candidates]
            self._index = {seq: index for index, seq in enumerate(candidates)}
            forking = self._width > 1
            reads = [
                Read(Kind.SAMPLE, [root] * self._width, candidates if forking else None, range(self._width) if forking else None)
            ]
        if self._top_n:
            reads.append(Read(Kind.TOPN, reads[0].at, reads[0].seqs, reads[0].stream, self._top_n))
        self._reads = reads if self._width == 1 else []
        return reads

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """Append what was drawn; end what is complete."""
        drawn: Samples = reads[0]
        edits: list[Edit] = []
        alive: list[int] = []
        tokens: list[int] = []
        ended: list[int] = []
        request = group.request
        rules = request.rules
        for i, seq in enumerate(seqs):
            at = drawn.begin + i
            token, logp, hit = drawn.token[at], drawn.logp[at], None
            index = self._index[seq]
            output = self._outputs[index]
            output.count += 1
            if rules is not None:
                group.text[seq], hit = rules.check(group.text.get(seq, rules.start()), token)
            reason = ending(request, token, output.count, hit)
            tops = None
            if self._with_tops:
                top = reads[1] if self._top_n else None
                tops = [Top(drawn.rank[at], top.top_id[i], top.top_logp[i]) if top else Top(drawn.rank[at], _NO_IDS, _NO_LOGPS)]
            if self._ranked:
                output.tokens.append(token)
                output.logps.append(logp)
                output.tops = (output.tops or []) + tops if tops else None
            else:
                edits.append(Emit(index, [token], [logp], tops))
            if reason is None:
                alive.append(seq)
                tokens.append(token)
            else:
                ended.append(seq)
                output.ended = reason
                if not self._ranked:
                    edits.append(Finish(index, reason[0], None, reason[1]))
        if alive:
            edits.append(Grow(alive, tokens, alive))
        if ended:
            edits.append(Drop(ended))
        return edits + self._rank(group) if self._ranked else edits

    def _rank(self, group: Group) -> list[Edit]:
        """Stream what all candidates agree on; when all have ended, deliver the best."""
        edits: list[Edit] = []
        first = self._outputs[0]
        agreed = self._delivered
        shortest = min(len(output.tokens) for output in self._outputs)
        while agreed < shortest and all(output.tokens[agreed] == first.tokens[agreed] for output in self._outputs):
            agreed += 1
        best = range(self._params.n)
        if agreed > self._delivered:
            edits += [self._emit(index, first, self._delivered, agreed) for index in best]
            self._delivered = agreed
        if all(output.ended for output in self._outputs):
            for output in self._outputs:
                output.score = self._score(group, output)
            ranking = sorted(range(self._width), key=lambda i: (-self._outputs[i].score, i))
            for index in best:
                output = self._outputs[ranking[index]]
                assert output.ended is not None
                if len(output.tokens) > self._delivered:
                    edits.append(self._emit(index, output, self._delivered, len(output.tokens)))
                edits.append(Finish(index, output.ended[0], output.score, output.ended[1]))
        return edits

    def _emit(self, index: int, output: _Output, begin: int, end: int) -> Emit:
        return Emit(index, output.tokens[begin:end], output.logps[begin:end], output.tops[begin:end] if output.tops else None)

    def _score(self, group: Group, output: _Output) -> float:
        total = sum(output.logps)
        if self._params.rank_by is None:
            return total / len(output.tokens)
        assert output.ended is not None
        rules = group.request.rules
        text = rules.text(output.tokens, output.ended[1]) if rules is not None else ""
        score = float(self._params.rank_by(Candidate(output.tokens.copy(), output.logps.copy(), total, output.ended[0], text)))
        if math.isnan(score):
            raise ValueError("rank_by returned NaN; it must return a number")
        return score
