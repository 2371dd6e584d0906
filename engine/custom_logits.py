"""Logits processors that a request brings along: Python callables, known to plans by a number only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.scheduler.endings import described
from pagefork.scheduler.params import LogitsProcessor

logger = logging.getLogger("pagefork")


class LogitsProcessors:
    """Calls the processors of each request on the rows of its sequences.

    A row that several probes of a step read is processed once, so that a processor is called once per token.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._registered: dict[int, tuple[int, Sequence[LogitsProcessor]]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}  # of this step, by slot and position; none inside a prompt
        self._failed: dict[int, str] = {}  # of this step, by number

    def register(self, number: int, prompt_len: int, processors: Sequence[LogitsProcessor]) -> None:
        """From now on `number` in a Spec stands for these processors."""
        self._registered[number] = prompt_len, processors

    def forget(self, number: int) -> None:
        """The request is over."""
        self._registered.pop(number, None)

    def end_step(self) -> None:
        """Forget what was found in this step."""
        self._rows.clear()
        self._failed = {}

    @property
    def failures(self) -> Mapping[int, str]:
        """Why the processors of requests failed in this step, by number. It stays as it is when the step ends."""
        return self._failed

    def apply(self, out: Tensor, number: NDArray[Any], slot: NDArray[Any], position: NDArray[Any], tokens: Tensor) -> None:
        """Process rows of logits fp32 [P, W] in place. tokens [P, L]: those of row p up to position[p] are its context.

        Where a processor raises or returns something else than logits, all rows of its request become NaN, and
        `failure` says why.
        """
        for row in number.nonzero()[0].tolist():
            own, key = int(number[row]), (int(slot[row]), int(position[row]))
            if own not in self._registered:  # its request ended while this step was in flight
                continue
            target = out[row, : self._vocab_size]
            if own not in self._failed and key not in self._rows:
                self._process(own, key, tokens[row, : key[1] + 1].tolist(), target)
            elif key in self._rows:
                target.copy_(self._rows[key])
            if own in self._failed:
                target.fill_(torch.nan)

    def _process(self, number: int, key: tuple[int, int], context: list[int], target: Tensor) -> None:
        prompt_len, processors = self._registered[number]
        prompt, output = context[:prompt_len], context[prompt_len:]
        logits = target.clone()
        try:
            for processor in processors:
                logits = self._checked(processor(prompt, output, logits))
            if not bool((logits < torch.inf).all()):
                raise ValueError("it returned NaN or +inf")
            target.copy_(logits)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            logger.exception("a logits processor failed")
            self._failed[number] = described(error)
        else:
            if len(context) >= prompt_len:  # a place inside the prompt is read once
                self._rows[key] = target.clone()

    def _checked(self, given: Any) -> Tensor:
        if not isinstance(given, Tensor) or given.shape != (self._vocab_size,) or not given.is_floating_point():
            shown = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"it returned {shown}; a logits processor returns logits [{self._vocab_size}]")
        return given
