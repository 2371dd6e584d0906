"""The typed errors with which single requests end while everyone else goes on."""

from __future__ import annotations

from .errors import (
    BudgetExceededError,
    InvalidRequestError,
    KVExhaustedError,
    NoTokenError,
    NumericError,
    PageforkError,
    StepFailedError,
)
from .group import Group
from .params import CommonParams


def described(error: BaseException) -> str:
    """Type and message of an error, which may be one of a user's own whose text can't be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001
        return type(error).__name__


def strategy_failed(group: Group, error: BaseException) -> PageforkError:
    """Its strategy, or a callable of the user's that the strategy called, raised."""
    if isinstance(error, PageforkError):
        return error
    name = type(group.strategy).__name__
    return _caused(StepFailedError(f"{name} failed for request {group.request.id!r}: {described(error)}"), error)


def step_failed(group: Group, error: BaseException) -> PageforkError:
    """The runner raised in a step that computed rows of this request."""
    text = f"the step that computed request {group.request.id!r} failed: {described(error)}"
    return _caused(StepFailedError(text), error)


def unusable(group: Group, why: str | None) -> PageforkError:
    """There were no usable logits; `why`: what made them so, where it was not the model."""
    if why is not None:
        return NoTokenError(f"request {group.request.id!r}: {why}")
    return NumericError(f"the model returned NaN, or nothing but -inf, for a row of request {group.request.id!r}")


def exhausted(group: Group, num_blocks: int, block_size: int) -> PageforkError:
    """The whole cache was too small."""
    return KVExhaustedError(
        f"request {group.request.id!r} filled the whole cache ({num_blocks} blocks of {block_size} tokens) and could not go on: "
        f"raise num_blocks or kv_cache_memory, or lower {group.request.params.widened_by} or max_tokens"
    )


def over_budget(group: Group) -> PageforkError:
    """More was computed for it than it may cost."""
    return BudgetExceededError(
        f"request {group.request.id!r} computed {group.usage.forward_tokens} tokens; it may compute "
        f"{group.request.max_forward_tokens} (max_forward_tokens): lower {group.request.params.widened_by} or max_tokens"
    )


def too_wide(width: int, params: CommonParams, allowed: int, setting: str) -> InvalidRequestError:
    """More sequences at once than can ever run."""
    return InvalidRequestError(
        f"{width} sequences at once were asked for; {setting} allows {allowed}: lower {params.widened_by}, or raise it"
    )


def too_large(prompt: int, width: int, blocks: int, num_blocks: int, block_size: int) -> InvalidRequestError:
    """A prompt that the whole cache can't hold."""
    return InvalidRequestError(
        f"a prompt of {prompt} tokens with {width} sequences needs {blocks} cache blocks of {block_size} tokens; "
        f"the cache has {num_blocks}: raise num_blocks or kv_cache_memory, or shorten the prompt"
    )


def _caused(error: PageforkError, cause: BaseException) -> PageforkError:
    error.__cause__ = cause
    return error
