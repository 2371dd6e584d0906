"""Reading rows of logits by the native library: draws, limits, best tokens, log-probs, ranks, merges of beams.

What is found is what `Distribution`, `top_logprobs` and `beam_merge` find, but for the last bits of exp.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .native import library
from .scratch import Scratch

ENTRY = np.dtype(
    [
        ("logits", np.uint64),  # address of a row
        ("adjusted", np.uint64),  # address of fp32 [V], logits after bans, bias and penalties; 0: there are none
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("seed", np.int64),
        ("stream", np.int64),
        ("position", np.uint32),
        ("temperature", np.float32),  # above 0, but for GREEDY
        ("token", np.int32),  # of a GIVEN one
        ("flags", np.uint32),
    ]
)
GREEDY, GIVEN, PROCESSED, RANKED, SHAPED, AS_LOGP = (np.uint32(1 << bit) for bit in range(6))  # flags
_PAIR_BYTES = 24


class Read(NamedTuple):
    """What was found of P entries. Where an entry is bad, the rest of it means nothing."""

    bad: Tensor  # bool [P]; NaN, +inf or nothing but -inf
    emptied: Tensor  # bool [P], bad though the logits are good
    floor: Tensor  # fp32 [P], the smallest value that passes the limits; -inf where all are off
    token: Tensor  # int32 [P], drawn or given; here and below 0 where bad
    logp: Tensor  # fp32 [P]
    rank: Tensor  # int32 [P]; 0: not asked for


class Best(NamedTuple):
    """The best tokens of P entries, [P, n]; -1, -inf, 0 and 0 behind the last."""

    ids: Tensor  # int32
    logp: Tensor  # fp32
    chance: Tensor  # fp32, the processed probability
    rank: Tensor  # int32


class Pairs(NamedTuple):
    """The best pairs of G groups, [G, n]; behind the last possible one -1 and -inf."""

    parent: Tensor  # int32
    token: Tensor  # int32
    score: Tensor  # fp32
    logp: Tensor  # fp32, of which the score is made
    own_logp: Tensor  # fp32, the model's
    bad: Tensor  # bool [P]


class _Found(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("bad", "emptied", "floor", "token", "logp", "rank", "best_id", "best_logp", "best_chance", "best_rank")
    )


class _Merges(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias", "edges")),
        *((name, ctypes.c_int64) for name in ("groups", "n")),
        *((name, ctypes.c_void_p) for name in ("pairs", "parent", "token", "score", "logp", "own_logp", "bad")),
    )


@functools.cache
def _native() -> ctypes.CDLL | None:
    lib = library()
    if lib is None:
        return None
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.pagefork_sampling_scratch.argtypes, lib.pagefork_sampling_scratch.restype = (long,), long
    lib.pagefork_read_rows.argtypes = (pointer, long, long, number, long, pointer, pointer, number)
    lib.pagefork_merge_rows.argtypes = (pointer, long, long, number, pointer, pointer, number)
    lib.pagefork_log_probs.argtypes = (pointer, long, long, number, pointer, pointer, number)
    for call in (lib.pagefork_read_rows, lib.pagefork_merge_rows, lib.pagefork_log_probs):
        call.restype = None
    return lib


def takes(logits: Tensor) -> bool:
    """Whether rows of these logits [U, V] can be read here."""
    return (
        len(logits) > 0
        and logits.dtype in _KINDS
        and logits.device.type == "cpu"
        and logits.stride(1) == 1
        and _native() is not None
    )


_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def entries(logits: Tensor, row: NDArray[Any]) -> NDArray[Any]:
    """ENTRY [P] of rows [P] of logits [U, V] that `takes` accepts, without any flags.

    They hold addresses: logits must live until they are read.
    """
    found = np.zeros(len(row), ENTRY)
    found["logits"] = row_addresses(logits, row)
    return found


def row_addresses(values: Tensor, row: NDArray[Any]) -> NDArray[Any]:
    """Addresses [P] of rows [P] of a tensor [U, V]."""
    return values.data_ptr() + row.astype(np.int64) * (values.stride(0) * values.element_size())


def _arguments(logits: Tensor, given: NDArray[Any], scratch: Scratch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What every function is given first and last."""
    threads, vocab = min(torch.get_num_threads(), len(given)), logits.shape[1]
    memory = scratch.take("native", (threads * _scratch_bytes(vocab) // 8,), torch.int64, logits.device)
    return (given.ctypes.data, len(given), vocab, _KINDS[logits.dtype]), (memory.data_ptr(), threads)


@functools.cache
def _scratch_bytes(vocab: int) -> int:
    lib = _native()
    assert lib is not None
    return int(lib.pagefork_sampling_scratch(vocab))


def read(
    logits: Tensor,
    given: NDArray[Any],
    scratch: Scratch,
    *,
    token: bool = True,
    n: int = 0,
    likely: bool = False,
    ranks: bool = False,
) -> tuple[Read, Best]:
    """Reads `entries` of logits [U, V]: tokens where `token`, and the n best of each.

    likely: the best by processed probability, without those that have none, instead of by the log-prob that is reported;
    then an entry that processing left nothing of is not bad. ranks: of the best ones.
    """
    lib = _native()
    assert lib is not None
    count = len(given)
    bad, emptied = torch.empty((2, count), dtype=torch.bool).unbind()
    ids, rank, floor, logp = torch.empty((4, count), dtype=torch.int32).unbind()
    one = Read(bad, emptied, floor.view(torch.float32), ids, logp.view(torch.float32), rank)
    best_ids, best_rank, best_logp, chance = torch.empty((4, count, n), dtype=torch.int32).unbind()
    best = Best(best_ids, best_logp.view(torch.float32), chance.view(torch.float32), best_rank)
    found = _Found(one.bad.data_ptr(), one.emptied.data_ptr(), one.floor.data_ptr())
    if token:
        found.token, found.logp, found.rank = (column.data_ptr() for column in (one.token, one.logp, one.rank))
    if n:
        found.best_id, found.best_logp = best.ids.data_ptr(), best.logp.data_ptr()
        found.best_chance = best.chance.data_ptr() if likely else None
        found.best_rank = best.rank.data_ptr() if ranks else None
    first, last = _arguments(logits, given, scratch)
    lib.pagefork_read_rows(*first, n, ctypes.addressof(found), *last)
    return one, best


def merge(logits: Tensor, given: NDArray[Any], bias: Tensor, offsets: Sequence[int], n: int, scratch: Scratch) -> Pairs:
    """The n >= 1 best pairs (entry, token) of each group by fp32(bias + log-prob); ties to the lower entry, then token.

    Log-probs are those of softmax(adjusted), or softmax(logits); AS_LOGP: these values themselves. A bad entry has no
    pairs. bias: contiguous fp32 [P]; offsets: as in `beam_merge`.
    """
    lib = _native()
    assert lib is not None
    edges = np.asarray(offsets, np.int64)
    groups, count = len(edges) - 1, len(given)
    ints, floats = torch.empty((2, groups, n), dtype=torch.int32), torch.empty((3, groups, n))
    found = Pairs(ints[0], ints[1], floats[0], floats[1], floats[2], torch.empty(count, dtype=torch.bool))
    memory = scratch.take("pairs", (count * n * _PAIR_BYTES // 8,), torch.int64, logits.device)
    merges = _Merges(bias.data_ptr(), edges.ctypes.data, groups, n, memory.data_ptr(), *(column.data_ptr() for column in found))
    first, last = _arguments(logits, given, scratch)
    lib.pagefork_merge_rows(*first, ctypes.addressof(merges), *last)
    return found


def log_probs(logits: Tensor, given: NDArray[Any], out: Tensor, scratch: Scratch) -> Tensor:
    """The model's log-probs of entries, into `out`, contiguous fp32 [P, V]."""
    lib = _native()
    assert lib is not None
    first, last = _arguments(logits, given, scratch)
    lib.pagefork_log_probs(*first, out.data_ptr(), *last)
    return out
