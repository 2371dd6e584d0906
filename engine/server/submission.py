"""What a Submit asks for, checked as far as that needs no engine; and the codes of errors."""

from __future__ import annotations

import msgspec

from pagefork.limits import LimitError, Limits
from pagefork.scheduler import errors
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.search_params import AnyParams
from pagefork.wire import Code, Submit, WireError, decode_tokens

from .seam import Facts

_CHARACTERS_PER_TOKEN = 64  # more than any text has on average

_params = msgspec.msgpack.Decoder(AnyParams | None)

# The first that fits; a bug in Pagefork fits none.
_CODES: list[tuple[type[Exception], Code]] = [
    (LimitError, Code.TOO_LARGE),
    (errors.KVExhaustedError, Code.KV_EXHAUSTED),
    (errors.BudgetExceededError, Code.BUDGET_EXCEEDED),
    (errors.NumericError, Code.NUMERIC),
    (errors.NoTokenError, Code.NO_TOKEN),
    (errors.ValueFunctionError, Code.VALUE_FUNCTION),
    (errors.StepFailedError, Code.STEP_FAILED),
    (errors.EngineDeadError, Code.ENGINE_LOST),
]


class Refusal(Exception):
    """A request was not accepted."""

    def __init__(self, code: Code, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


def code_of(error: BaseException) -> Code:
    """The code that tells a client of an error."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, errors.PageforkError) and isinstance(error, ValueError):
        return Code.INVALID_ARGUMENT
    return Code.INTERNAL


def message_of(error: BaseException) -> str:
    """Its text, where it is one of ours; what went wrong inside of the engine is for its log."""
    return str(error) if isinstance(error, errors.PageforkError) else f"{type(error).__name__} in the engine; its log says more"


def weight(submit: Submit, blob: bytes | None) -> int:
    """Tokens to reserve for a prompt: a text has at most one for each byte."""
    return len(submit.text.encode()) if submit.text is not None else len(blob or b"") // 4


def check(submit: Submit, blob: bytes | None, limits: Limits, facts: Facts) -> tuple[str | list[int], CommonParams | None]:
    """Prompt and parameters. Raises Refusal."""
    try:
        limits.check_encoded(memoryview(submit.params).nbytes)
        params: CommonParams | None = _params.decode(submit.params)
    except LimitError as error:
        raise Refusal(Code.TOO_LARGE, str(error)) from None
    except Exception as error:  # noqa: BLE001 - deep nesting is a RecursionError; whatever it is, these are no parameters
        raise Refusal(Code.INVALID_ARGUMENT, f"params: {error}") from None
    try:
        if params is not None:
            limits.check(params)
        return _prompt(submit, blob, limits, facts), params
    except LimitError as error:
        raise Refusal(Code.TOO_LARGE, str(error)) from None
    except WireError as error:
        raise Refusal(Code.INVALID_ARGUMENT, str(error)) from None


def _prompt(submit: Submit, blob: bytes | None, limits: Limits, facts: Facts) -> str | list[int]:
    if (submit.text is None) == (blob is None):
        raise Refusal(Code.INVALID_ARGUMENT, "a prompt is either `text` or a blob of token ids; give one of them")
    if submit.text is not None:
        limits.check_text(submit.text)
        if len(submit.text) > _CHARACTERS_PER_TOKEN * facts.max_model_len:  # it would take long to find out by tokenising it
            raise Refusal(
                Code.INVALID_ARGUMENT,
                f"the prompt has {len(submit.text)} characters; max_model_len={facts.max_model_len} tokens do not hold so many",
            )
        return submit.text
    assert blob is not None
    count = len(blob) // 4
    if count > limits.max_forward_tokens:
        raise LimitError(
            f"the prompt has {count} tokens; this service's limit is {limits.max_forward_tokens} (max_forward_tokens)"
        )
    if count >= facts.max_model_len:
        raise Refusal(
            Code.INVALID_ARGUMENT,
            f"the prompt has {count} tokens; max_model_len={facts.max_model_len} allows at most {facts.max_model_len - 1}",
        )
    tokens = decode_tokens(blob)
    if tokens and max(tokens) >= facts.vocab_size:
        raise Refusal(
            Code.INVALID_ARGUMENT,
            f"the prompt has token id {max(tokens)}; the model's ids go from 0 to {facts.vocab_size - 1}",
        )
    return tokens
