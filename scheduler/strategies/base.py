"""What a decoding strategy is: a policy that answers what was read with edits of its group.

A strategy never sees slots, blocks or tensors. It holds what is needed to go on after losing every block:
scores, finished hypotheses, tree statistics. Sequences (live KV) and outputs (what the user sees) are
different things: an output may outlive its sequence and a sequence need not become an output.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import msgspec

from ..errors import ParameterError
from ..params import CommonParams
from ..plan import Floats, Ints, Kind
from ..request import Request

if TYPE_CHECKING:
    from ..group import Group

# Sequence ids or per-sequence values: narrow groups use lists, wide ones arrays; both are taken everywhere.
Ids = Sequence[int] | Ints


class Grow(msgspec.Struct, gc=False):
    """dst[i] = src[i] + token[i]. dst == src appends; a fresh dst (Group.fresh) forks, sharing all blocks.

    The children of a sequence and its own continuation belong in one Grow: all are taken from what it was before.
    `stream` gives fresh sequences their random stream. `run=False` keeps them parked: blocks, no row.
    `text` are the text states of dst, where the group has text rules.
    """

    src: Ids
    token: Ids
    dst: Ids
    stream: Ids | None = None
    run: bool = True
    text: list[Any] | None = None


class Drop(msgspec.Struct):
    """Release the KV of these sequences; they end."""

    seqs: Ids


class Top(NamedTuple):
    """The read-out of one token for `logprobs`: rank of the chosen one, and the most probable ids."""

    rank: int
    ids: Ints
    logps: Floats


class Emit(msgspec.Struct, gc=False):
    """Deliver tokens of output `index`, with the log-prob of each, and their Top where logprobs were asked for."""

    index: int
    tokens: list[int]
    logps: list[float]
    tops: list[Top] | None = None


class Finish(msgspec.Struct):
    """Output `index` is complete. `stop_reason`: the stop text or token id that ended it."""

    index: int
    reason: str
    score: float | None = None
    stop_reason: int | str | None = None


class Ask(msgspec.Struct):
    """Wait for numbers that are computed outside the step: `function(items)` returns one for each item.

    It runs in a thread of its own and has `timeout` seconds; Strategy.answer gets the numbers. Others run on. A group has
    one Ask at a time.
    """

    function: Callable[[list[Any]], Sequence[float]]
    items: list[Any]
    timeout: float


Edit = Grow | Drop | Emit | Finish | Ask


class Footprint(NamedTuple):
    """`width`: most sequences with a slot at once; `outputs`: how many Finish edits end the group."""

    width: int
    outputs: int = 1


class Read(msgspec.Struct):
    """A Probe in terms of sequences: read at the last position of `at[i]`, on behalf of `seqs[i]`.

    `seqs` defaults to `at`. Ids in it that were just made by Group.fresh are forked from `at[i]` in the
    same plan, with `stream[i]`: several draws from one forward. MERGE takes all of `at` as one group, or several:
    `groups` are their offsets into `at`, from 0 to its length. The order of `at` is the strategy's to choose, and breaks ties.
    """

    kind: Kind
    at: Ids
    seqs: Ids | None = None
    stream: Ids | None = None
    n: int = 0
    processed: bool = False
    window: Ints | None = None
    groups: Sequence[int] | None = None
    bias: Sequence[float] | Floats | None = None


class Samples(msgspec.Struct, gc=False):
    """The reads of a SAMPLE probe: entries begin, begin + 1, ... of plain lists that hold those of the whole step.

    Lists, since a group samples few sequences and arrays of one are slow; shared, since cutting them costs more than reading.
    """

    begin: int
    token: list[int]
    logp: list[float]
    rank: list[int]


class Merged(msgspec.Struct, gc=False):
    """The reads of a MERGE without `groups`: the n best pairs, best first; parents and tokens are -1 where there are fewer.

    Where the rows took several steps, those of each step one after another. rank: where a spec asks for it.
    """

    parent: list[int]
    token: list[int]
    score: list[float]
    logp: list[float]
    rank: list[int] | None


class Strategy(Protocol):
    """One instance per group.

    lockstep: `advance` gets whole generations, also when their rows took several steps. pipelined: the next
    row may be planned before the token it feeds is known here (each row draws one token and appends it).
    """

    params: ClassVar[type[CommonParams]]
    lockstep: ClassVar[bool]
    pipelined: ClassVar[bool]

    def __init__(self, request: Request) -> None: ...

    def footprint(self) -> Footprint: ...

    def probe(self, group: Group, seqs: Ids) -> list[Read]:
        """What to read when the rows of `seqs` are computed up to their last known token."""

    def advance(self, group: Group, seqs: Ids, reads: list[Any]) -> list[Edit]:
        """What follows from the reads, one item per Read of `probe`: Samples for SAMPLE, Merged for a MERGE without
        groups, else Reads.

        `seqs` are the sequences that were read (Read.seqs of the first). Entries are numbered as in `seqs`. A generation
        whose rows took several steps comes with the reads of those steps one after another: MERGE then has the groups of
        each, best of their own, so that what is best over all is left to choose here. What was read and is neither grown
        nor dropped is parked. Afterwards the group must have a sequence to run, an Ask in flight, or all outputs finished.
        """

    def answer(self, group: Group, values: list[float]) -> list[Edit]:
        """What follows from the values of the last Ask."""

    def shed(self, group: Group) -> Ids:
        """Parked sequences whose blocks may go, first to go first; they stay alive and are recomputed when grown."""

    def trace(self) -> list[Any]:
        """What happened, one Struct per step, where the request asked for a trace; bounded."""

    @property
    def complete(self) -> bool:
        """Whether trace() leaves nothing out for its size."""


class Base:
    """Defaults of a strategy that asks nothing and parks nothing."""

    lockstep: ClassVar[bool] = True
    pipelined: ClassVar[bool] = False
    complete: bool = True

    def answer(self, group: Group, values: list[float]) -> list[Edit]:
        """Never called: no Ask was made."""
        raise TypeError(f"{type(self).__name__} asked for nothing")

    def shed(self, group: Group) -> Ids:
        """Nothing is parked."""
        return []

    def trace(self) -> list[Any]:
        """Nothing beyond the outputs."""
        return []


def ending(request: Request, token: int, length: int, hit: str | None) -> tuple[str, int | str | None] | None:
    """Why an output ends after `token`, its `length`-th one: (finish reason, stop reason), or None.

    `hit` is the stop text that the token completed, if any.
    """
    if token in request.end_ids:
        return "stop", None if token in request.model_end_ids else token
    if hit is not None and length >= request.params.min_tokens:
        return "stop", hit
    if length >= request.room:
        return "length", None
    return None


_STRATEGIES: dict[type[CommonParams], Callable[[Request], Strategy]] = {}


def register(strategy: Any) -> Any:
    """Class decorator: requests with `strategy.params` are decoded by it."""
    _STRATEGIES[strategy.params] = strategy
    return strategy


@cache
def discover() -> None:
    """Import every module beside this one, so that each registers its own.

    To be called before requests come: a process that can open no more files finds none, and none later.
    """
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def make(request: Request) -> Strategy:
    """The strategy for a request's parameters. Raises ParameterError when there is none."""
    discover()
    if type(request.params) not in _STRATEGIES:
        known = ", ".join(sorted(kind.__name__ for kind in _STRATEGIES))
        raise ParameterError(f"no strategy for {type(request.params).__name__}; there are {known}")
    return _STRATEGIES[type(request.params)](request)
