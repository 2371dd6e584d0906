"""The messages between a client and the engine's service, and how they become frames. docs/protocol.md tells the rules.

A message is two frames and sometimes a third: a header of 8 bytes, a msgpack body, and a blob of little-endian 32-bit token
ids. Clients are held to the letter: an unknown field is an error. What the engine sends may have fields that an older
client doesn't know. Nothing in a body names code to run.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from pagefork.scheduler.accounting import Trace
from pagefork.scheduler.errors import InvalidRequestError, PageforkError

from .outputs import EngineStats, Logprob

MAGIC = b"PGFK"
VERSION = 1
MAX_FRAME = 8 << 20  # bytes of one frame from a client
MAX_FRAMES = 3  # of a message, after the routing id

_HEADER = struct.Struct("<4sBBH")

Rid = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
ClientName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{0,64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Code(StrEnum):
    """What went wrong, for programs. INVALID_ARGUMENT to DRAINING come before a request is accepted, the rest after."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"  # the message or a parameter can't be honoured
    TOO_LARGE = "TOO_LARGE"  # above a limit of the service, which Welcome lists
    UNAUTHENTICATED = "UNAUTHENTICATED"  # no Hello, no valid token, or not this session's request
    VERSION = "VERSION"  # no protocol version in common
    DUPLICATE_MISMATCH = "DUPLICATE_MISMATCH"  # the rid is taken by another body
    QUEUE_FULL = "QUEUE_FULL"  # try again after retry_after_ms
    DRAINING = "DRAINING"  # the engine is about to stop
    DEADLINE = "DEADLINE"  # deadline_ms passed
    CANCELLED = "CANCELLED"  # aborted by its client
    CLIENT_STALLED = "CLIENT_STALLED"  # there was output, and no credit for it
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"  # it computed more tokens than a request may
    KV_EXHAUSTED = "KV_EXHAUSTED"  # it does not fit the cache, not even alone
    NUMERIC = "NUMERIC"  # the model returned NaN
    NO_TOKEN = "NO_TOKEN"  # its own bans left no token to choose
    VALUE_FUNCTION = "VALUE_FUNCTION"  # its value function failed
    STEP_FAILED = "STEP_FAILED"  # the step that computed it raised
    ENGINE_LOST = "ENGINE_LOST"  # the engine is gone, or another one has taken its place
    INTERNAL = "INTERNAL"  # a bug in the service


class _FromClient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Unknown fields are refused."""


class _FromEngine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Unknown fields are ignored."""


class Hello(_FromClient, frozen=True, kw_only=True):
    """The first message of a connection. `session`: the secret of an earlier Welcome, to go on with its requests."""

    proto_min: Count = VERSION
    proto_max: Count = VERSION
    client: ClientName = ""
    token: Annotated[str, Meta(max_length=256)] | None = None
    session: Annotated[bytes, Meta(max_length=64)] | None = None


class Submit(_FromClient, frozen=True, kw_only=True):
    """A request. The prompt is `text`, or the blob's token ids.

    params: a map with the field `type`: "sampling", "beam", "contrastive" or "mcts"; nil: the model's own defaults.
    deadline_ms: from the arrival of this message. credit: tokens of each output that may be sent; see Credit. stream: send
    Deltas; else all comes with Finished, and credit is of no concern.
    """

    rid: Rid
    params: Raw = Raw(b"\xc0")
    text: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    credit: Count = 0
    stream: bool = True


class Credit(_FromClient, frozen=True, kw_only=True):
    """The engine may send the tokens of each output before the offset `upto`, which never goes back."""

    rid: Rid
    upto: Count


class Abort(_FromClient, frozen=True, kw_only=True):
    """End a request; its Finished says CANCELLED. An unknown rid is ignored."""

    rid: Rid


class Have(msgspec.Struct, frozen=True):
    """What a client has of one output: tokens, and characters (code points) of text."""

    tokens: Count = 0
    characters: Count = 0


class Attach(_FromClient, frozen=True, kw_only=True):
    """Go on with a request of this session after what the client has of each output (by index; none: from the start)."""

    rid: Rid
    have: Annotated[list[Have], Meta(max_length=1 << 16)] = []
    credit: Count = 0


class Ping(_FromClient, frozen=True, kw_only=True):
    """A sign of life, wanted every `ping_ms`; `t` comes back."""

    t: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class Stats(_FromClient, frozen=True, kw_only=True):
    """Asks for a StatsReply."""


class Bye(_FromClient, frozen=True, kw_only=True):
    """The session is over: end its requests, which nobody reads any more."""


class Welcome(_FromEngine, frozen=True, kw_only=True):
    """The answer to Hello.

    boot_id: a new one for every start of the engine. session: 16 secret bytes. resumed: whether it is the session that Hello
    named; else its requests are gone. limits: by name, as `pagefork serve --help` has them. A client pings every `ping_ms`;
    after `lease_ms` without a message, and `grace_ms` to come back, its requests are aborted. value_functions: names that
    a search may be guided by.
    """

    proto: int
    boot_id: str
    session: bytes
    resumed: bool
    model: str
    vocab_size: int
    max_model_len: int
    limits: dict[str, int]
    ping_ms: int
    lease_ms: int
    grace_ms: int
    capabilities: list[str] = []
    value_functions: list[str] = []


class Accepted(_FromEngine, frozen=True, kw_only=True):
    """The request is queued behind `queue_position` others; `attached`: it was there before."""

    rid: str
    queue_position: int = 0
    attached: bool = False


class Delta(_FromEngine, frozen=True, kw_only=True, rename={"start": "from"}):
    """What an output has grown by: tokens from the offset `from`, text from the code point `text_from`.

    Text may lag behind the tokens: a character can take several, and what could begin a stop text is held back.
    logprobs: one map for each token, where they were asked for.
    """

    rid: str
    index: int
    start: int
    tokens: list[int] = []
    text_from: int = 0
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None


class Deltas(_FromEngine, frozen=True, kw_only=True):
    """Deltas of several requests of one session, in order."""

    deltas: list[Delta]


class Final(_FromEngine, frozen=True, kw_only=True, rename={"start": "from"}):
    """How an output ended, and what no Delta brought of it: all, where nothing was streamed. Else as CompletionOutput."""

    index: int
    start: int
    tokens: list[int] = []
    text_from: int = 0
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None


class Usage(_FromEngine, frozen=True, kw_only=True):
    """What a request took; see RequestMetrics. completion_tokens: of all outputs."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    forward_tokens: int = 0
    forks: int = 0
    blocks_copied: int = 0
    blocks_freed: int = 0
    shared_block_ratio: float = 0.0


class Timings(_FromEngine, frozen=True, kw_only=True):
    """Milliseconds from the arrival of Submit."""

    first_token_ms: float | None = None
    total_ms: float = 0.0


class Failure(_FromEngine, frozen=True, kw_only=True):
    """Why a request has no proper end. `code` is one of Code, or one that a newer engine has."""

    code: str
    message: str


class Finished(_FromEngine, frozen=True, kw_only=True):
    """The one terminal message of an accepted request. The blob: the prompt's token ids, where it came as text."""

    rid: str
    outputs: list[Final]
    usage: Usage = Usage()
    timings: Timings = Timings()
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    trace: Trace | None = None
    error: Failure | None = None


class Pong(_FromEngine, frozen=True, kw_only=True):
    """The answer to Ping. state: "running" or "draining". last_step_age_ms: since a step ended, while there is work; else 0."""

    t: int
    boot_id: str
    state: str
    last_step_age_ms: int
    running: int
    waiting: int
    free_blocks: int


class Histogram(_FromEngine, frozen=True, kw_only=True):
    """Observations in seconds: `counts[i]` up to `bounds[i]`, one more count for those above; not cumulative."""

    bounds: list[float]
    counts: list[int]
    sum: float


class ServiceStats(_FromEngine, frozen=True, kw_only=True):
    """Totals of the service since the start, and a moment of it. finished: by finish reason of outputs; refused: by Code."""

    sessions: int
    requests: int
    reserved_tokens: int
    step_age_seconds: float
    malformed_frames: int
    accepted: int
    finished: dict[str, int]
    refused: dict[str, int]
    failed: dict[str, int]
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    e2e_request_latency: Histogram


class StatsReply(_FromEngine, frozen=True, kw_only=True):
    """The answer to Stats."""

    engine: EngineStats
    service: ServiceStats


class GoAway(_FromEngine, frozen=True, kw_only=True):
    """The engine ends this session, or itself; requests whose Finished has not come are lost."""

    reason: str
    retry_after_ms: int | None = None


class Error(_FromEngine, frozen=True, kw_only=True):
    """A message was refused; with `rid`, that request was not accepted, and this is all that comes of it."""

    code: str
    message: str
    rid: str | None = None
    retry_after_ms: int | None = None


ClientMessage = Hello | Submit | Credit | Abort | Attach | Ping | Stats | Bye
EngineMessage = Welcome | Accepted | Deltas | Finished | Pong | StatsReply | GoAway | Error

# By the type byte of the header.
CLIENT_TYPES: dict[int, type[msgspec.Struct]] = {
    1: Hello, 2: Submit, 3: Credit, 4: Abort, 5: Attach, 6: Ping, 7: Stats, 8: Bye,
}  # fmt: skip
ENGINE_TYPES: dict[int, type[msgspec.Struct]] = {
    128: Welcome, 129: Accepted, 130: Deltas, 131: Finished, 132: Pong, 133: StatsReply, 134: GoAway, 135: Error,
}  # fmt: skip


class WireError(PageforkError):
    """Frames that are no message; `rid` where they say whose they were meant to be."""

    def __init__(self, message: str, code: Code = Code.INVALID_ARGUMENT, rid: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.rid = rid


def _refuse_code(value: Any) -> Any:
    raise InvalidRequestError(
        f"{type(value).__name__} {value!r:.80} can't be sent to an engine in another process: logits_processors and rank_by "
        "are for engines in process; a value_fn is named as the service registered it"
    )


_encoder = msgspec.msgpack.Encoder(enc_hook=_refuse_code)
_decoders = {number: msgspec.msgpack.Decoder(kind) for number, kind in (CLIENT_TYPES | ENGINE_TYPES).items()}
_headers = {kind: _HEADER.pack(MAGIC, VERSION, number, 0) for number, kind in (CLIENT_TYPES | ENGINE_TYPES).items()}


def encode(message: ClientMessage | EngineMessage, blob: bytes | None = None) -> list[bytes]:
    """The frames of a message. Raises InvalidRequestError for what can't leave the process."""
    frames = [_headers[type(message)], _encoder.encode(message)]
    return frames if blob is None else [*frames, blob]


def decode_from_client(frames: Sequence[bytes]) -> tuple[ClientMessage, bytes | None]:
    """The message of a client, and its blob. Raises WireError, whatever the bytes are."""
    return _decode(frames, CLIENT_TYPES)


def decode_from_engine(frames: Sequence[bytes]) -> tuple[EngineMessage, bytes | None]:
    """The message of an engine, and its blob. Raises WireError, whatever the bytes are."""
    return _decode(frames, ENGINE_TYPES)


def _decode(frames: Sequence[bytes], types: dict[int, type[msgspec.Struct]]) -> tuple[Any, bytes | None]:
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"a message has 2 or {MAX_FRAMES} frames (header, body, blob), got {len(frames)}")
    if len(frames[0]) != _HEADER.size:
        raise WireError(f"a header has {_HEADER.size} bytes, got {len(frames[0])}")
    magic, version, number, flags = _HEADER.unpack(frames[0])
    if magic != MAGIC:
        raise WireError(f"a header begins with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise WireError(f"this is version {VERSION} of the protocol, got {version}", Code.VERSION)
    if number not in types or flags:
        raise WireError(f"type {number} with flags {flags} is no message that may come from there")
    try:
        message = _decoders[number].decode(frames[1])
    except Exception as error:  # noqa: BLE001 - deep nesting is a RecursionError; whatever it is, these bytes are no message
        raise WireError(f"{types[number].__name__}: {error}", rid=_rid_of(frames[1])) from None
    return message, bytes(frames[2]) if len(frames) == MAX_FRAMES else None


class _Named(msgspec.Struct):
    rid: Rid


_named = msgspec.msgpack.Decoder(_Named)


def _rid_of(body: bytes) -> str | None:
    """Whose request a body is about that is no message otherwise."""
    try:
        return _named.decode(body).rid
    except Exception:  # noqa: BLE001 - as above
        return None


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as a blob. Raises InvalidRequestError for what is no list of such."""
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except (struct.error, TypeError) as error:
        raise InvalidRequestError(f"a prompt is a text or a list of token ids (integers from 0 to 2**32 - 1): {error}") from None


def decode_tokens(blob: bytes) -> list[int]:
    """A blob's token ids. Raises WireError when its length is no multiple of 4."""
    if len(blob) % 4:
        raise WireError(f"a blob of token ids has 4 bytes for each, got {len(blob)} bytes")
    return list(struct.unpack(f"<{len(blob) // 4}I", blob))


def encode_params(params: Any) -> Raw:
    """Parameters for Submit; None for the model's own defaults. Raises InvalidRequestError for functions."""
    return Raw(_encoder.encode(params))
