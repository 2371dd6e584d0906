"""Beam search, and diverse beam search (Vijayakumar et al. 2018), with the semantics of Hugging Face's generate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
import numpy as np

from ..errors import NoTokenError, ParameterError
from ..group import Group
from ..params import CommonParams
from ..plan import Kind, Reads
from ..request import Request
from ..search_params import BeamSearchParams
from ._beam_trace import BeamStep, Recorder
from ._hypotheses import Nodes, Search, Tokens
from .base import Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Merged, Read, ending, register

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
        _check_scores(params, request.room)
        self._params, self._request = params, request
        self._grouped = params.num_beam_groups > 1
        self._greedy = params.beam_width == 1
        width = params.beam_width // params.num_beam_groups
        vocab = request.extra.get("vocab_size", _NO_TOKEN)
        self._keep = max(2, 1 + len(request.end_ids)) * width
        self._n = min(self._keep + params.beam_width - width, vocab) if self._grouped else min(self._keep, width * vocab)
        self._ranked = params.logprobs is not None
        top_n = params.logprobs or 0
        self._top_n = top_n if 0 <= top_n <= vocab else vocab
        early = True if self._greedy else params.early_stopping
        start = None if request.rules is None else request.rules.start()
        self._searches = [Search(width, request.room, params.length_penalty, early, start) for _ in range(params.num_beam_groups)]
        self._running = self._searches
        self._seqs: list[int] = []  # all beams, group by group, best first
        self._scores = [0.0]
        self._parts = 0  # steps in which the rows of this generation were read
        self._length = 0
        self._delivered = 0
        self._recorder = Recorder(params.num_beam_groups) if params.trace else None

    def footprint(self) -> Footprint:
        """As many sequences as beams."""
        return Footprint(self._params.beam_width, self._params.n)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """The best continuations of the beams together, or of each alone where there are groups."""
        if not self._seqs:
            self._seqs = [int(seq) for seq in seqs]
        self._parts += 1
        at, bias = self._seqs, self._scores
        if len(seqs) < len(at):
            ranks = sorted(self._ranks(seqs))
            at, bias = [at[rank] for rank in ranks], [bias[rank] for rank in ranks]
        bounds = range(len(at) + 1) if self._grouped else None
        reads = [Read(Kind.MERGE, at, n=self._n, processed=self._greedy, groups=bounds, bias=bias)]
        if self._top_n:
            reads.append(Read(Kind.TOPN, at, n=self._top_n))
        return reads

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """One step of every group that is not over."""
        self._length += 1
        if self._parts > 1:
            self._sort(seqs, reads)
        recorder = self._recorder if self.complete else None
        step = BeamStep(self._length) if recorder is not None else None
        parents: list[int] = []
        tokens: list[int] = []
        taken: list[int] = []
        for search in self._running:
            before, beams = search.scores, slice(search.begin, search.begin + len(search.scores))
            found = self._candidates(reads[0], beams, taken)
            stopped, states = self._stopped(search, found)
            tops = (reads[1].top_id[beams].copy(), reads[1].top_logp[beams].copy()) if self._top_n else None
            run = search.step(found, stopped, tops)
            if run:
                parents += [beam + search.begin for beam in search.parents] if search.begin else search.parents
                tokens += search.chosen
            if states:
                search.text = [states[i] for i in run]
            taken += search.chosen
            if recorder is not None and step is not None:
                recorder.add(step, self._searches.index(search), search, before, found, run)
        self._parts = 0
        if recorder is not None and step is not None:
            self.complete = recorder.end(step)
        running = self._running = [search for search in self._running if not search.done]
        if not running:
            return [*self._outputs(), Drop(self._seqs)]
        edits = self._agreed()
        self._grow(group, parents, tokens, edits)
        self._scores = []
        for search in running:
            search.begin = len(self._scores)
            self._scores += search.scores
        return edits

    def trace(self) -> list[Any]:
        """One BeamStep for each step."""
        return [] if self._recorder is None else self._recorder.steps

    def _ranks(self, seqs: Ids) -> list[int]:
        """Where some sequences stand among all beams."""
        rank_of = {seq: rank for rank, seq in enumerate(self._seqs)}
        return [rank_of[int(seq)] for seq in seqs]

    def _sort(self, seqs: Ids, reads: list[Merged | Reads]) -> None:
        """Bring reads that came in several steps into the order of the beams."""
        ranks = np.array(self._ranks(seqs))
        entries = np.argsort(ranks)
        for read in reads:
            if isinstance(read, Merged):
                read.parent = [-1 if parent < 0 else int(ranks[parent]) for parent in read.parent]
                continue
            if read.parent is not None:
                read.parent = np.where(read.parent < 0, -1, ranks[read.parent])
            for name in ("parent", "top_id", "top_logp", "top_rank", "score"):
                column = getattr(read, name)
                if column is not None:
                    setattr(read, name, column[entries])

    def _candidates(self, read: Merged | Reads, beams: slice, taken: list[int]) -> Nodes:
        """The best continuations of a group's beams. `taken`: tokens with which beams of earlier groups go on."""
        if not isinstance(read, Merged):
            return self._penalised(read, beams, taken)
        found = Nodes(read.parent, read.token, read.score, read.logp, read.rank if self._ranked else None)
        if self._parts > 1:
            pairs = zip(read.score, read.parent, read.token, range(len(read.token)), strict=True)
            best = sorted((-score, parent, token, i) for score, parent, token, i in pairs if parent >= 0)
            return found.take([i for *_, i in best[: self._keep]])
        return found if read.parent[-1] >= 0 else found.head(read.parent.index(-1))

    def _penalised(self, read: Reads, beams: slice, taken: list[int]) -> Nodes:
        """The same of one of several groups, which were read for each beam."""
        parent, token, score, logp, rank = read.parent, read.top_id, read.score, read.top_logp, read.top_rank
        assert parent is not None and token is not None and score is not None and logp is not None
        some = parent[beams] >= 0
        parent, token, score = parent[beams][some] - beams.start, token[beams][some], score[beams][some]
        if taken and self._params.diversity_penalty:
            before = np.sort(taken)
            times = np.searchsorted(before, token, "right") - np.searchsorted(before, token, "left")
            score = score - np.float32(self._params.diversity_penalty) * times.astype(np.float32)
        best = np.arange(len(score))
        if len(best) > self._keep:
            best = (score >= np.partition(score, -self._keep)[-self._keep]).nonzero()[0]
        best = best[np.lexsort((token[best], parent[best], -score[best]))[: self._keep]]
        ranks = rank[beams][some][best].tolist() if self._ranked and rank is not None else None
        logps = logp[beams][some][best].tolist()
        return Nodes(parent[best].tolist(), token[best].tolist(), score[best].tolist(), logps, ranks)

    def _stopped(self, search: Search, found: Nodes) -> tuple[list[int], list[Any]]:
        """Which candidates end with a token or text that says so; text states of those that may go on.

        What comes after the last one that can go on is not looked at for texts.
        """
        ends, rules = self._request.end_ids, self._request.rules
        if rules is None:
            none = ends.isdisjoint(found.token)
            return [] if none else [i for i, token in enumerate(found.token) if token in ends], []
        stopped, states, running = list[int](), list[Any](), 0
        for i, (parent, token) in enumerate(zip(found.parent, found.token, strict=True)):
            end = token in ends
            state, hit = (None, None) if end else rules.check(search.text[parent], token)
            states.append(state)
            if end or (hit is not None and self._length >= self._params.min_tokens):
                stopped.append(i)
                continue
            running += 1
            if running == search.width:
                break
        return stopped, states

    def _grow(self, group: Group, parents: list[int], tokens: list[int], edits: list[Edit]) -> None:
        """Beams with their tokens: the first child of a beam takes its sequence, the others fork, childless beams go."""
        before = self._seqs
        src = dst = [before[beam] for beam in parents]
        going = set(src)
        forks = len(src) - len(going)
        if forks:
            fresh, dst, left = group.fresh(forks), [], going.copy()
            for seq in src:
                if seq in left:
                    left.discard(seq)
                    dst.append(seq)
                else:
                    dst.append(fresh.pop())
        edits.append(Grow(src, tokens, dst))
        if len(going) < len(before):
            edits.append(Drop([seq for seq in before if seq not in going]))
        self._seqs = dst

    def _agreed(self) -> list[Edit]:
        """Tokens that all outputs are known to begin with, as far as they were not delivered."""
        begin = self._delivered
        first, *others = [search.agreed.tokens for search in self._searches]
        end = len(first)
        for tokens in others:
            end = next((at for at in range(begin, min(end, len(tokens))) if tokens[at] != first[at]), min(end, len(tokens)))
        if begin == end:
            return []
        self._delivered = end
        tokens, logps, tops = self._searches[0].agreed
        part = Tokens(tokens[begin:end], logps[begin:end], tops[begin:end])
        return [self._emit(index, part) for index in range(self._params.n)]

    def _emit(self, index: int, part: Tokens) -> Emit:
        return Emit(index, part.tokens, part.logps, part.tops if self._ranked else None)

    def _outputs(self) -> list[Edit]:
        """The n best of all pools."""
        pool = [(search, hypothesis) for search in self._searches for hypothesis in search.pool]
        if not pool:
            raise NoTokenError(
                f"request {self._request.id!r}: its bans, bias, penalties or logits processors left no token after any beam"
            )
        best = sorted(pool, key=lambda entry: -entry[1].score)[: self._params.n]
        ends: list[tuple[Tokens, Finish]] = []
        for search, hypothesis in best:
            tail = search.path(hypothesis)
            tokens, logps, tops = search.agreed
            skip = self._delivered
            rest = Tokens(tokens[skip:] + tail.tokens, logps[skip:] + tail.logps, tops[skip:] + tail.tops)
            reason, stop = self._reason(tokens + tail.tokens)
            ends.append((rest, Finish(-1, reason, hypothesis.score, stop)))
        edits: list[Edit] = []
        for index in range(self._params.n):
            rest, finish = ends[min(index, len(ends) - 1)]
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


def _check_scores(params: BeamSearchParams, room: int) -> None:
    bias = max(map(abs, (params.logit_bias or {}).values()), default=0.0)
    for name, most in (("logit_bias", bias), ("diversity_penalty", params.diversity_penalty * params.beam_width)):
        if room * most > 1e37:
            raise ParameterError(f"{name}, up to {most:.4g} a token, leaves single precision within {room} tokens; lower it")
