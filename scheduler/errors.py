"""The one error tree of Pagefork: every error that it raises on purpose derives from PageforkError.

A message says what was given, what is allowed and, where there is a choice, which setting to change.
"""

from __future__ import annotations


class PageforkError(Exception):
    """Base of all errors raised by Pagefork."""


class InvalidRequestError(PageforkError, ValueError):
    """A request or one of its parameters can't be honoured; it was refused before any work."""


class ParameterError(InvalidRequestError):
    """A parameter is unknown, out of its range, or contradicts another one."""


class ConfigError(PageforkError, ValueError):
    """An engine setting is unknown, out of its range, or contradicts another one."""


class ModelError(PageforkError, ValueError):
    """A checkpoint can't be loaded: missing, damaged, of an unsupported architecture or format."""


class KVExhaustedError(PageforkError):
    """A group that had the whole cache to itself could not take its next step."""


class BudgetExceededError(PageforkError):
    """A request computed more tokens than it may."""


class NumericError(PageforkError):
    """The model returned NaN, or nothing but -inf, for a row of this request."""


class NoTokenError(PageforkError):
    """A request's own bans, bias, penalties or logits processors left no token to draw, or a processor of its failed."""


class ValueFunctionError(PageforkError):
    """A request's value function raised, returned something else than one finite number per leaf, or took too long."""


class StepFailedError(PageforkError):
    """The step that computed this request raised; the cause is attached."""


class EngineMisuseError(PageforkError, RuntimeError):
    """The engine was called from a second thread or from inside its own step."""


class EngineDeadError(PageforkError):
    """The engine stopped for good: it was shut down, or failed in a way that it can't go on from; the cause is attached."""


class ServiceError(PageforkError):
    """What an engine in another process answered with, or that it is gone.

    code: one of `pagefork.wire.Code`, for programs. retry_after_ms: when to try again, where that is known. retry_safe:
    whether nothing had come of the request, so that the same one can be sent again. output: what had come of it.
    """

    def __init__(
        self, code: str, message: str, retry_after_ms: int | None = None, retry_safe: bool = False, output: object = None
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.retry_safe = retry_safe
        self.output = output


class BlockAccountingError(PageforkError, AssertionError):
    """The block pool contradicts the tables that refer to it; a bug in Pagefork, never in its user."""
