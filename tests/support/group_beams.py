"""Group beam search by the definition, or by the rules of transformers 4.55.4 where these differ, on whole sequences.

There are four such rules; all of them together give what was recorded, none of them what is expected here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# padding: groups that are done go on with padding tokens (id 0), and later groups are penalised for them.
# bound: the best candidate, though it may have ended, says what a group can still reach; not the best that runs on.
# order: the diversity penalty is taken off before the repetition penalty scales the log-probs, not afterwards.
# last: at the last step all beams that run on finish as well, not only those among the best candidates.
OLD_RULES = frozenset({"padding", "bound", "order", "last"})
Hypothesis = tuple[float, list[int]]


class Group:
    """Beams and finished hypotheses of one group, best first."""

    def __init__(self, settings: dict[str, Any], ends: set[int], rules: frozenset[str]) -> None:
        self.width = settings["num_beams"] // settings["num_beam_groups"]
        self.length = settings["max_new_tokens"]
        self.exponent = settings.get("length_penalty", 1.0)
        self.early = settings.get("early_stopping", False)
        self.repetition = settings.get("repetition_penalty", 1.0)
        self.diversity = settings["diversity_penalty"]
        self.ends, self.rules = ends, rules
        self.beams: list[Hypothesis] = [(0.0, [])]
        self.pool: list[Hypothesis] = []
        self.done = False

    def step(self, logps: Tensor, rows: Tensor, taken: list[int]) -> list[int]:
        """Continue the beams, whose tokens with the prompt are `rows`; the tokens with which they go on."""
        penalty = self.diversity * torch.bincount(torch.tensor(taken, dtype=torch.long), minlength=logps.shape[1])
        logps = self._repeated(logps - penalty, rows) if "order" in self.rules else self._repeated(logps, rows) - penalty
        total = (logps + torch.tensor([score for score, _ in self.beams])[:, None]).reshape(-1)
        count = min(len(total), max(2, 1 + len(self.ends)) * self.width)
        candidates = [
            (score, [*self.beams[at // logps.shape[1]][1], at % logps.shape[1]])
            for score, at in zip(*(column.tolist() for column in total.topk(count)), strict=True)
        ]
        self._take(candidates)
        return [tokens[-1] for _, tokens in candidates if tokens[-1] not in self.ends][: self.width]

    def _take(self, candidates: list[Hypothesis]) -> None:
        length = len(candidates[0][1])
        last = length == self.length
        self.beams = []
        for rank, (score, tokens) in enumerate(candidates):
            if tokens[-1] in self.ends or (last and "last" not in self.rules):
                if rank < self.width:
                    self._finish(score, tokens)
            elif len(self.beams) < self.width:
                self.beams.append((score, tokens))
        if len(self.pool) == self.width:
            running = candidates if "bound" in self.rules else self.beams
            best = running[0][0] if running else -torch.inf
            self.done = self.early is True or self.pool[-1][0] >= best / length**self.exponent
        if last and not self.done and "last" in self.rules:
            for score, tokens in self.beams:
                self._finish(score, tokens)

    def _finish(self, score: float, tokens: list[int]) -> None:
        self.pool.append((score / len(tokens) ** self.exponent, tokens))
        self.pool.sort(key=lambda hypothesis: -hypothesis[0])
        del self.pool[self.width :]

    def _repeated(self, logps: Tensor, rows: Tensor) -> Tensor:
        own = logps.gather(1, rows)
        return logps.scatter(1, rows, torch.where(own < 0, own * self.repetition, own / self.repetition))


@torch.no_grad()
def group_beams(
    model: Any, prompt: list[int], settings: dict[str, Any], ends: set[int], rules: frozenset[str] = frozenset()
) -> list[Hypothesis]:
    """All outputs with their scores, best first; `settings` as `generate` takes them, `rules` some of OLD_RULES."""
    groups = [Group(settings, ends, rules) for _ in range(settings["num_beam_groups"])]
    for _ in range(settings["max_new_tokens"]):
        running = [group for group in groups if not group.done]
        rows = torch.tensor([prompt + tokens for group in running for _, tokens in group.beams])
        logps = model(rows).logits[:, -1].float().log_softmax(-1)
        taken: list[int] = []
        begin = 0
        for group in groups:
            if group in running:
                part = slice(begin, begin + len(group.beams))
                begin = part.stop
                taken += group.step(logps[part], rows[part], taken)
            elif "padding" in rules:
                taken += [0] * group.width
        if all(group.done for group in groups):
            break
    return sorted((hypothesis for group in groups for hypothesis in group.pool), key=lambda hypothesis: -hypothesis[0])
