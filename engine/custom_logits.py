"""Logits processors that a request brings along: Python callables, known to plans by a number only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.scheduler.params import LogitsProcessor

logger = logging.getLogger("pagefork")


class LogitsProcessors:
    """Calls the processors of each request on the rows of its sequences.

    A row that several probes of a step read is processed once, so that a processor is called once per token.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._registered: dict[int, tuple[int, Sequence[LogitsProcessor]]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}
        self.failures: dict[tuple[int, int], str] = {}  # of this step, by slot and position

    def register(self, number: int, prompt_len: int, processors: Sequence[LogitsProcessor]) -> None:
        """From now on `number` in a Spec stands for these processors."""
        self._registered[number] = prompt_len, processors

    def forget(self, number: int) -> None:
        """The request is over."""
        self._registered.pop(number, None)

    def begin_step(self) -> None:
        """Forget the rows of the last step."""
        self._rows.clear()
        self.failures.clear()

    def apply(self, out: Tensor, number: NDArray[Any], slot: NDArray[Any], position: NDArray[Any], tokens: Tensor) -> None:
        """Process rows of logits fp32 [P, W] in place. tokens [P, L]: those of row p up to position[p] are its context.

        A row whose processor raises or returns something else than logits becomes NaN, and `failures` says why.
        """
        for row in number.nonzero()[0].tolist():
            key = int(slot[row]), int(position[row])
            if key not in self._rows:
                context = tokens[row, : key[1] + 1].tolist()
                logits = out[row, : self._vocab_size].clone()
                try:
                    self._rows[key] = self._call(int(number[row]), context, logits)
                except Exception as error:  # the user's code; only this request fails
                    logger.exception("a logits processor failed")
                    self.failures[key] = f"{type(error).__name__}: {error}"
                    self._rows[key] = torch.full_like(logits, torch.nan)
            out[row, : self._vocab_size] = self._rows[key]

    def _call(self, number: int, context: list[int], logits: Tensor) -> Tensor:
        prompt_len, processors = self._registered[number]
        prompt, output = context[:prompt_len], context[prompt_len:]
        for processor in processors:
            given = processor(prompt, output, logits)
            if not isinstance(given, Tensor) or given.shape != (self._vocab_size,) or not given.is_floating_point():
                shown = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"it returned {shown}; a logits processor returns logits [{self._vocab_size}]")
            logits = given
        return logits.to(torch.float32)
