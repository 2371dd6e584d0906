"""Contrastive search: of the most probable tokens, the one whose hidden state is least like those before it.

Su et al. 2022, "A Contrastive Framework for Neural Text Generation" (SimCTG); what it computes is what Hugging Face's
generate(penalty_alpha, top_k) does.

score(v) = (1 - alpha) * p(v) - alpha * max over earlier positions j of cos(h_v, h_j)

p is the processed distribution without a temperature, v one of its top_k. The hidden state of v is only known once v is
computed, so every candidate gets a sequence of its own. Their rows also say what comes after each of them: one forward of
top_k rows per token, and one of the prompt.

`adaptive` follows Garces Arias et al. 2024, "Adaptive Contrastive Search: Uncertainty-Guided Decoding for Open-Ended Text
Generation"; see _Uncertainty.
"""

from __future__ import annotations

import math
from bisect import insort
from statistics import median
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np

from ..errors import NoTokenError
from ..group import Group
from ..params import CommonParams
from ..plan import Floats, Ints, Kind, Reads, ints
from ..request import Request
from ..search_params import ContrastiveSearchParams
from .base import Base, Drop, Edit, Emit, Finish, Footprint, Grow, Ids, Read, Top, ending, register

_MOST_ENTRIES = 10_000  # of candidates, in a trace
_NO_TOP = np.empty(0, np.int32), np.empty(0, np.float32)
_SHARPNESS = 8.0  # q of the paper, as in the experiments that its authors publish
_LARGEST = 1 - 1e-6  # difference of entropies: the artanh of 1 is infinite


class ContrastiveStep(msgspec.Struct, tag="contrastive"):
    """One emitted token: candidates by falling probability, and which of them it was.

    alpha: the weight that counted. confidence: the running mean of the largest p, smoothed by `momentum`.
    """

    token: list[int]
    p: list[float]
    similarity: list[float]
    score: list[float]
    chosen: int
    alpha: float
    confidence: float


class _Candidates(NamedTuple):
    """What the next token may be, the most probable first; log-probs and ranks are those that are reported."""

    seqs: list[int]
    ids: Ints
    p: Floats
    logps: Floats
    ranks: Ints | None
    top: tuple[Ints, Floats]
    alpha: float


class _Uncertainty:
    """The number of candidates and alpha at each token, from how uncertain the model is compared to earlier tokens.

    With H(p) the entropy of p, made a distribution, over ln(size of p), median(H) that of all earlier tokens, and
    delta = 8 * artanh(H(p) - median(H)), 0 at the first token:
    count = top_k * (1 + 2 * sigmoid(delta)) / 3, rounded, with p the top_k most probable tokens;
    alpha' = sigmoid(ln(alpha / (1 - alpha)) + delta), with p the first `count` of them.

    The paper has 5 to 15 candidates, as here with top_k=15, and its alpha' is that of alpha=0.5. It takes the count from the
    entropy of the whole vocabulary, where here the tokens beyond top_k are not looked at; and it divides by the logarithm
    of the current number of candidates where the median was taken over other numbers, where here every H is in [0, 1].
    """

    def __init__(self, alpha: float, top_k: int) -> None:
        self._alpha = alpha
        self._top_k = top_k
        self._of_all: list[float] = []
        self._of_candidates: list[float] = []

    def settings(self, p: Floats) -> tuple[int, float]:
        """How many of the tokens with probabilities p (falling, above 0) are candidates, and their alpha."""
        share = _sigmoid(self._delta(p, self._of_all), 0.5)
        count = min(len(p), max(1, round(self._top_k * (1 + 2 * share) / 3)))
        return count, _sigmoid(self._delta(p[:count], self._of_candidates), self._alpha)

    def _delta(self, p: Floats, earlier: list[float]) -> float:
        q = p.astype(np.float64) / p.sum(dtype=np.float64)
        entropy = float(-(q * np.log(q)).sum()) / math.log(len(q)) if len(q) > 1 else 0.0
        difference = entropy - median(earlier) if earlier else 0.0
        insort(earlier, entropy)
        return _SHARPNESS * math.atanh(max(-_LARGEST, min(_LARGEST, difference)))


def _sigmoid(delta: float, middle: float) -> float:
    """A logistic function of delta that is `middle`, in [0, 1], at 0."""
    up, down = middle * math.exp(delta / 2), (1 - middle) * math.exp(-delta / 2)
    return up / (up + down)


@register
class Contrastive(Base):
    """The candidates run; the chosen one's sequence forks into the next, the others end.

    Candidates without a chance (p = 0) are left out. Equal scores go to the higher p, equal p to the lower token id.
    """

    params: ClassVar[type[CommonParams]] = ContrastiveSearchParams

    def __init__(self, request: Request) -> None:
        assert isinstance(request.params, ContrastiveSearchParams)
        self._params = request.params
        vocab_size = request.extra.get("vocab_size", self._params.top_k)
        self._top_k = min(self._params.top_k, vocab_size)
        self._with_tops = self._params.logprobs is not None
        self._top_n = self._params.logprobs or 0
        if not 0 <= self._top_n <= vocab_size:
            self._top_n = vocab_size
        self._uncertainty = _Uncertainty(self._params.alpha, self._top_k) if self._params.adaptive else None
        self._candidates: _Candidates | None = None
        self._text = request.rules.start() if request.rules is not None else None
        self._count = 0
        self._steps: list[ContrastiveStep] = []
        self._entries = 0
        self.complete = True

    def footprint(self) -> Footprint:
        """One sequence for each candidate."""
        return Footprint(self._top_k)

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """What may follow each row, and how like earlier ones it is; the prompt's last row need not be unlike any."""
        window = None if self._candidates is None else np.full(len(seqs), self._params.window or 0, np.int32)
        reads = [Read(Kind.TOPN, seqs, n=self._top_k, processed=True, window=window)]
        if self._top_n:
            reads.append(Read(Kind.TOPN, seqs, n=self._top_n))
        return reads

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """Emit the best candidate and go on from it."""
        candidates = self._candidates
        if candidates is None:
            return [self._expand(group, int(seqs[0]), reads, 0)]
        row = {int(seq): i for i, seq in enumerate(seqs)}
        rows = [row[seq] for seq in candidates.seqs]
        chosen = self._choose(candidates, reads[0].sim[rows])
        token, logp = int(candidates.ids[chosen]), float(candidates.logps[chosen])
        tops = None
        if self._with_tops:
            rank = 0 if candidates.ranks is None else int(candidates.ranks[chosen])
            tops = [Top(rank, *candidates.top)]
        emit = Emit(0, [token], [logp], tops)
        reason = self._ending(group.request, token)
        if reason is not None:
            return [emit, Finish(0, reason[0], None, reason[1]), Drop(candidates.seqs)]
        lost = [seq for i, seq in enumerate(candidates.seqs) if i != chosen]
        return [emit, self._expand(group, candidates.seqs[chosen], reads, rows[chosen]), Drop(lost)]

    def trace(self) -> list[Any]:
        """One ContrastiveStep per token."""
        return self._steps

    def _choose(self, candidates: _Candidates, similarity: Floats) -> int:
        """The index of the best candidate; in float32, as Hugging Face does."""
        alpha = candidates.alpha
        score = np.float32(1 - alpha) * candidates.p - np.float32(alpha) * similarity
        chosen = int(np.argmax(score))
        if self._params.trace and self.complete:
            self._record(candidates, similarity, score, chosen)
        return chosen

    def _record(self, candidates: _Candidates, similarity: Floats, score: Floats, chosen: int) -> None:
        self._entries += len(score)
        if self._entries > _MOST_ENTRIES:
            self.complete = False
            return
        largest, momentum = float(candidates.p[0]), self._params.momentum
        confidence = momentum * self._steps[-1].confidence + (1 - momentum) * largest if self._steps else largest
        ids, p = candidates.ids.tolist(), candidates.p.tolist()
        self._steps.append(ContrastiveStep(ids, p, similarity.tolist(), score.tolist(), chosen, candidates.alpha, confidence))

    def _ending(self, request: Request, token: int) -> tuple[str, int | str | None] | None:
        self._count += 1
        hit = None
        if request.rules is not None:
            self._text, hit = request.rules.check(self._text, token)
        return ending(request, token, self._count, hit)

    def _expand(self, group: Group, seq: int, reads: list[Reads], row: int) -> Grow:
        """Sequences for what may follow `seq`: its own goes on with the most probable token."""
        read = reads[0]
        assert read.top_id is not None and read.top_p is not None and read.top_logp is not None
        count = int((read.top_p[row] > 0).sum())
        if not count:
            raise NoTokenError(
                f"request {group.request.id!r}: its bans, logit_bias, penalties or logits processors left no token to choose"
            )
        alpha = self._params.alpha
        if self._uncertainty is not None:
            count, alpha = self._uncertainty.settings(read.top_p[row, :count])
        top = _NO_TOP
        if self._top_n:
            table = reads[1]
            assert table.top_id is not None and table.top_logp is not None
            top = table.top_id[row], table.top_logp[row]
        self._candidates = _Candidates(
            [seq, *group.fresh(count - 1)],
            read.top_id[row, :count],
            read.top_p[row, :count],
            read.top_logp[row, :count],
            None if read.top_rank is None else read.top_rank[row, :count],
            top,
            alpha,
        )
        return Grow([seq] * count, self._candidates.ids, ints(self._candidates.seqs))
