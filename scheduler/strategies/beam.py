"""Beam search, and diverse beam search (Vijayakumar et al. 2018), with the semantics of Hugging Face's generate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
import numpy as np

from ..errors import NoTokenError, ParameterError
from ..group import Group
from ..params import CommonParams
from ..plan import Bools, Floats, Ints, Kind, Longs, Reads, ints
from ..request import Request
from ..search_params import BeamSearchParams
from ._beam_trace import BeamStep, Recorder
from ._hypotheses import Nodes, Search, Tokens
from .base import Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Read, ending, register

_LARGEST = math.log(1e37)  # single precision, with a margin
_NO_TOKEN = np.iinfo(np.int32).max


@register
class Beam(Base):
    """K beams run in one generation after another; each of G groups keeps its own K / G, and its own pool of finished ones.

    Groups run in order within a step. A group takes diversity_penalty off a candidate for every beam of earlier groups that
    goes on with the same token, finished groups and end tokens not counted; what is taken off stays off the score. At the end
    the pools are merged: the n best by score, ties to the earlier group, then to the one that finished earlier.

    A width of 1 ends with its first end token whatever early_stopping says: it is greedy. Where bans or a tiny vocabulary
    leave fewer than n outputs, the last one is repeated, so that every output is one that the search found.

    Tokens that all beams and finished outputs share are delivered at once, to every output.
    """

    params: ClassVar[type[CommonParams]] = BeamSearchParams

    def __init__(self, request: Request) -> None:
        params = request.params
        assert isinstance(params, BeamSearchParams)
        _check_length_penalty(params.length_penalty, request.room)
        self._params, self._request = params, request
        self._grouped = params.num_beam_groups > 1
        width = params.beam_width // params.num_beam_groups
        vocab = request.extra.get("vocab_size", _NO_TOKEN)
        self._keep = max(2, 1 + len(request.end_ids)) * width
        self._n = min(self._keep + params.beam_width - width, vocab) if self._grouped else min(self._keep, width * vocab)
        self._ranked = params.logprobs is not None
        top_n = params.logprobs or 0
        self._top_n = top_n if 0 <= top_n <= vocab else vocab
        self._ends = ints([*sorted(request.end_ids), _NO_TOKEN])  # for look-ups by bisection
        early = True if params.beam_width == 1 else params.early_stopping
        start = None if request.rules is None else request.rules.start()
        self._searches = [Search(width, request.room, params.length_penalty, early, start) for _ in range(params.num_beam_groups)]
        self._running = self._searches
        self._seqs: Ints = ints()  # all beams, group by group, best first
        self._scores: Floats = np.zeros(1, np.float32)
        self._bounds: Ints = ints([0])  # groups of the last MERGE
        self._parts = 0  # steps in which the rows of this generation were read
        self._length = 0
        self._delivered = 0
        self._recorder = Recorder(params.num_beam_groups) if params.trace else None

    def footprint(self) -> Footprint:
        """As many sequences as beams."""
        return Footprint(self._params.beam_width, self._params.n)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """The best continuations of the beams together, or of each alone where there are groups."""
        if not len(self._seqs):
            self._seqs = ints(seqs)
        self._parts += 1
        at, bias = self._seqs, self._scores
        if len(seqs) < len(at):
            ranks = np.sort(self._ranks(seqs))
            at, bias = at[ranks], bias[ranks]
        if self._bounds[-1] != len(at):
            self._bounds = np.arange(len(at) + 1, dtype=np.int32) if self._grouped else ints([0, len(at)])
        reads = [Read(Kind.MERGE, at, n=self._n, groups=self._bounds, bias=bias)]
        if self._top_n:
            reads.append(Read(Kind.TOPN, at, n=self._top_n))
        return reads

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """One step of every group that is not over."""
        self._length += 1
        if self._parts > 1:
            self._sort(seqs, reads)
        self._parts = 0
        recorder = self._recorder if self.complete else None
        step = BeamStep(self._length) if recorder is not None else None
        parents, tokens, taken = [], [], ints()
        for search in self._running:
            before, beams = search.scores, slice(search.begin, search.begin + len(search.scores))
            found = self._candidates(beams, reads[0], taken)
            stopped, states = self._stopped(search, found)
            tops = (reads[1].top_id[beams].copy(), reads[1].top_logp[beams].copy()) if self._top_n else None
            run = search.step(found, stopped, tops)
            parents.append(found.parent[run] + search.begin if search.begin else found.parent[run])
            tokens.append(search.chosen if len(run) else found.token[run])
            if states:
                search.text = [states[i] for i in run.tolist()]
            if self._params.diversity_penalty:
                taken = np.sort(np.concatenate((taken, search.chosen)))
            if recorder is not None and step is not None:
                recorder.add(step, self._searches.index(search), search, before, found, run)
        if recorder is not None and step is not None:
            self.complete = recorder.end(step)
        running = self._running = [search for search in self._running if not search.done]
        if not running:
            return [*self._outputs(), Drop(self._seqs)]
        edits = self._agreed()
        if self._grouped:
            self._grow(group, np.concatenate(parents), np.concatenate(tokens), edits)
            self._scores = np.concatenate([search.scores for search in running])
            begin = 0
            for search in running:
                search.begin, begin = begin, begin + len(search.scores)
        else:
            self._grow(group, parents[0], tokens[0], edits)
            self._scores = running[0].scores
        return edits

    def trace(self) -> list[Any]:
        """One BeamStep for each step."""
        return [] if self._recorder is None else self._recorder.steps

    def _ranks(self, seqs: Ids) -> Longs:
        """Where some sequences stand among all beams."""
        order = np.argsort(self._seqs)
        return order[np.searchsorted(self._seqs, seqs, sorter=order)]

    def _sort(self, seqs: Ids, reads: list[Reads]) -> None:
        """Bring reads that came in several steps into the order of the beams."""
        ranks = self._ranks(seqs)
        entries = np.argsort(ranks)
        merged = reads[0]
        assert merged.parent is not None
        merged.parent = np.where(merged.parent < 0, -1, ranks[merged.parent])
        for read in reads if self._grouped else reads[1:]:
            for name in ("parent", "top_id", "top_logp", "top_rank", "score"):
                column = getattr(read, name)
                if column is not None:
                    setattr(read, name, column[entries])

    def _candidates(self, beams: slice, read: Reads, taken: Ints) -> Nodes:
        """The best continuations of a group's beams. `taken`: tokens with which beams of earlier groups go on, sorted."""
        parent, token, score, logp, rank = read.parent, read.top_id, read.score, read.top_logp, read.top_rank
        assert parent is not None and token is not None and score is not None and logp is not None
        if not self._ranked:
            rank = None
        if not self._grouped and len(parent) == 1:
            found = Nodes(parent[0], token[0], score[0], logp[0], None if rank is None else rank[0])
            return found if found.parent[-1] >= 0 else found.take((found.parent >= 0).nonzero()[0])
        rows = beams if self._grouped else slice(None)
        some = parent[rows] >= 0
        parent, token, score, logp = parent[rows][some], token[rows][some], score[rows][some], logp[rows][some]
        rank = None if rank is None else rank[rows][some]
        if len(taken):
            times = np.searchsorted(taken, token, "right") - np.searchsorted(taken, token, "left")
            score = score - np.float32(self._params.diversity_penalty) * times.astype(np.float32)
        found = Nodes(parent - beams.start, token, score, logp, rank)
        surplus = len(score) - self._keep
        if surplus > 0:
            found = found.take((score >= np.partition(score, surplus)[surplus]).nonzero()[0])
        return found.take(np.lexsort((found.token, found.parent, -found.score))[: self._keep])

    def _stopped(self, search: Search, found: Nodes) -> tuple[Bools, list[Any]]:
        """Which candidates end with a token or text that says so; text states of those that may go on.

        What comes after the last one that can go on is not looked at.
        """
        stopped: Bools = self._ends[self._ends.searchsorted(found.token)] == found.token
        rules, states, running = self._request.rules, list[Any](), 0
        if rules is None:
            return stopped, states
        for i, (parent, token, end) in enumerate(zip(found.parent.tolist(), found.token.tolist(), stopped.tolist(), strict=True)):
            state, hit = (None, None) if end else rules.check(search.text[parent], token)
            states.append(state)
            if end or (hit is not None and self._length >= self._params.min_tokens):
                stopped[i] = True
                continue
            running += 1
            if running == search.width:
                break
        return stopped, states

    def _grow(self, group: Group, parents: Ints, tokens: Ints, edits: list[Edit]) -> None:
        """Beams with their tokens: the first child of a beam takes its sequence, the others fork, childless beams go."""
        order = parents.argsort(kind="stable")
        ordered = parents[order]
        forked = order[1:][ordered[1:] == ordered[:-1]]
        src = self._seqs[parents]
        dst = src
        if len(forked):
            dst = src.copy()
            dst[forked] = group.fresh(len(forked))
        edits.append(Grow(src, tokens, dst))
        if len(parents) - len(forked) < len(self._seqs):
            lost = np.ones(len(self._seqs), np.bool_)
            lost[parents] = False
            edits.append(Drop(self._seqs[lost]))
        self._seqs = dst

    def _agreed(self) -> list[Edit]:
        """Tokens that all outputs are known to begin with, as far as they were not delivered."""
        first = self._searches[0].agreed
        begin = end = self._delivered
        if len(first.tokens) == begin:
            return []
        shortest = min([len(search.agreed.tokens) for search in self._searches])
        while end < shortest and all(search.agreed.tokens[end] == first.tokens[end] for search in self._searches[1:]):
            end += 1
        if begin == end:
            return []
        self._delivered = end
        part = Tokens(first.tokens[begin:end], first.logps[begin:end], first.tops[begin:end])
        return [self._emit(index, part) for index in range(self._params.n)]

    def _emit(self, index: int, part: Tokens) -> Emit:
        return Emit(index, part.tokens, part.logps, part.tops if self._ranked else None)

    def _outputs(self) -> list[Edit]:
        """The n best of all pools."""
        pools = [search.pool for search in self._searches]
        pool = np.concatenate(pools)
        if not len(pool):
            raise NoTokenError(f"request {self._request.id!r}: its bans, logit_bias or penalties left no token after any beam")
        owner = np.repeat(np.arange(len(pools)), [len(pool) for pool in pools])
        best = np.argsort(-pool["score"], kind="stable")[: self._params.n]
        ends: dict[int, tuple[Tokens, Finish]] = {}
        for number in np.unique(owner[best]).tolist():
            search, mine = self._searches[number], best[owner[best] == number]
            for at, tail in zip(mine.tolist(), search.paths(pool[mine]), strict=True):
                rest = Tokens(*(a[self._delivered :] + b for a, b in zip(search.agreed, tail, strict=True)))
                reason, stop = self._reason(search.agreed.tokens + tail.tokens)
                ends[at] = rest, Finish(-1, reason, float(pool["score"][at]), stop)
        edits: list[Edit] = []
        for index in range(self._params.n):
            rest, finish = ends[int(best[min(index, len(best) - 1)])]
            edits += [self._emit(index, rest)] if rest.tokens else []
            edits.append(msgspec.structs.replace(finish, index=index))
        return edits

    def _reason(self, tokens: list[int]) -> tuple[str, int | str | None]:
        """Why an output of these tokens ended."""
        rules, hit = self._request.rules, None
        if rules is not None:
            state = rules.start()
            for token in tokens:
                state, hit = rules.check(state, token)
        reason = ending(self._request, tokens[-1], len(tokens), hit)
        assert reason is not None
        return reason


def _check_length_penalty(length_penalty: float, room: int) -> None:
    limit = _LARGEST / math.log(max(2, room))
    if abs(length_penalty) > limit:
        raise ParameterError(
            f"length_penalty={length_penalty} with outputs of up to {room} tokens leaves single precision; "
            f"it must be within -{limit:.4g} and {limit:.4g}"
        )
