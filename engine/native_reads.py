"""The read-outs of a probe by the native library: on a CPU, one call for all entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagefork.kernels import native_sampling as native
from pagefork.kernels.filters import GREEDY
from pagefork.kernels.scratch import Scratch, chunks
from pagefork.kernels.upload import upload, upload_index
from pagefork.scheduler.plan import Bools, Ints, Kind, Probe

from .pending import Columns
from .slot_state import SlotState

_CPU = torch.device("cpu")
_Found = tuple[native.Read, native.Best]


class NativeReads:
    """Finds what TorchReads finds, but for the last bits of exp."""

    def __init__(self, state: SlotState) -> None:
        self._state, self._scratch = state, Scratch()
        self._readers: dict[Kind, Callable[[Tensor, Probe, NDArray[Any], NDArray[Any]], Columns]] = {
            Kind.SAMPLE: self._sample,
            Kind.TOPN: self._top,
            Kind.MERGE: self._merge,
            Kind.TARGET: self._target,
        }

    def takes(self, logits: Tensor) -> bool:
        return native.takes(logits)

    def read(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """As in Sampler.read."""
        return self._readers[probe.kind](logits, probe, row, position)

    def _sample(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        fields = self._state.fields.take(probe.slot)
        entries = _entries(logits, row, fields, (fields["temperature"] >= GREEDY) | fields["processed"])
        entries["flags"] |= fields["rank"] * native.RANKED
        entries["seed"], entries["stream"], entries["position"] = fields["seed"], fields["stream"], position + 1
        found, _ = self._found(logits, entries, probe.slot, row, position)
        return {"bad": found.bad, "token": found.token, "logp": found.logp, "rank": found.rank, "emptied": found.emptied}

    def _top(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """The most probable tokens by the log-probs that are reported, or by the processed probability."""
        fields, likely = self._state.fields.take(probe.slot), probe.processed
        shaped, ranked = fields["processed"] | likely, fields["rank"] & likely
        entries = _entries(logits, row, fields, shaped)
        entries["flags"] |= ranked * native.RANKED
        options = {"token": False, "n": probe.n, "likely": likely, "ranks": bool(ranked.any())}
        found, best = self._found(logits, entries, probe.slot, row, position, shaped, **options)
        columns = {"bad": found.bad, "top_id": best.ids, "top_logp": best.logp, "emptied": found.emptied}
        if likely:
            columns["top_p"] = best.chance
        if options["ranks"]:
            columns["top_rank"] = best.rank
        return columns

    def _target(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """Log-prob and rank of given tokens, and the most probable ones at their places."""
        assert probe.target is not None
        fields = self._state.fields.take(probe.slot)
        entries = _entries(logits, row, fields, fields["processed"])
        entries["flags"] |= native.GIVEN | native.RANKED
        entries["token"] = probe.target
        found, best = self._found(logits, entries, probe.slot, row, position, fields["processed"], n=probe.n)
        top = {"top_id": best.ids, "top_logp": best.logp}
        return {"bad": found.bad, "logp": found.logp, "rank": found.rank, **top, "emptied": found.emptied}

    def _merge(self, logits: Tensor, probe: Probe, row: NDArray[Any], position: NDArray[Any]) -> Columns:
        """As in `read_merge`."""
        assert probe.groups is not None and probe.bias is not None
        state, slot = self._state, probe.slot
        entries = native.entries(logits, row)
        index = state.adjusted(slot, position).nonzero()[0]
        if len(index):
            values = self._rows(logits, row[index])
            if not probe.processed:  # bans, bias, penalties and processors apply to log-probs
                out = self._scratch.like("log-probs", values, torch.float32)
                values = native.log_probs(logits, entries[index], out, self._scratch)
                entries["flags"][index] = native.AS_LOGP
            self._adjust(entries, index, values, slot, position)
        pairs = native.merge(logits, entries, upload(probe.bias, _CPU), probe.groups.tolist(), probe.n, self._scratch)
        fields = state.fields.take(slot)
        emptied = upload(state.failed(slot), _CPU) & ~pairs.bad
        columns = {"bad": pairs.bad | emptied, "emptied": emptied, "parent": pairs.parent, "top_id": pairs.token}
        columns |= {"score": pairs.score, "top_logp": pairs.own_logp}
        parent = pairs.parent.numpy()
        if fields["processed"].any():
            columns["top_logp"] = torch.where(upload(fields["processed"][parent], _CPU), pairs.logp, pairs.own_logp)
        if (asked := fields["rank"][parent] & (parent >= 0)).any():
            columns["top_rank"] = self._ranks(logits, row[parent], pairs.token, asked)
        return columns

    def _ranks(self, logits: Tensor, row: NDArray[Any], token: Tensor, asked: Bools) -> Tensor:
        """int32 [G, n]: ranks among the model's log-probs of tokens [G, n] of rows [G, n], 0 where nobody asked."""
        entries = native.entries(logits, row[asked])
        entries["flags"], entries["token"] = native.GIVEN | native.RANKED, token.numpy()[asked]
        ranks = np.zeros(asked.shape, np.int32)
        ranks[asked] = native.read(logits, entries, self._scratch)[0].rank.numpy()
        return upload(ranks, _CPU)

    def _found(
        self,
        logits: Tensor,
        entries: NDArray[Any],
        slot: Ints,
        row: NDArray[Any],
        position: NDArray[Any],
        adjusting: Bools | None = None,
        **options: Any,
    ) -> _Found:
        """What `native.read` finds. Only entries marked `adjusting` (None: all) need bans, bias, penalties and processors."""
        adjusted = self._state.adjusted(slot, position)
        if adjusting is not None:
            adjusted &= adjusting
        if not adjusted.any():
            return native.read(logits, entries, self._scratch, **options)
        found: list[_Found] = []
        for cut in chunks(len(slot), logits.shape[1], _CPU):  # bounds the memory of adjusted rows
            index = adjusted[cut].nonzero()[0]
            if len(index):
                values = self._rows(logits, row[cut][index])
                self._adjust(entries[cut], index, values, slot[cut], position[cut])
            found.append(native.read(logits, entries[cut], self._scratch, **options))
        ones, bests = zip(*found, strict=True)
        return native.Read(*map(torch.cat, zip(*ones, strict=True))), native.Best(*map(torch.cat, zip(*bests, strict=True)))

    def _rows(self, logits: Tensor, row: NDArray[Any]) -> Tensor:
        out = self._scratch.take("gathered", (len(row), logits.shape[1]), logits.dtype, _CPU)
        return torch.index_select(logits, 0, upload_index(row, _CPU), out=out)

    def _adjust(self, entries: NDArray[Any], index: NDArray[Any], values: Tensor, slot: Ints, position: NDArray[Any]) -> None:
        """Gives entries `index` their adjusted values [len(index), V], which live until the next call."""
        adjusted = self._state.adjust(values, slot[index], position[index], self._scratch)
        entries["adjusted"][index] = native.row_addresses(adjusted, np.arange(len(index)))


def _entries(logits: Tensor, row: NDArray[Any], fields: NDArray[Any], shaped: Bools) -> NDArray[Any]:
    """native.ENTRY [P]; the processed distribution matters where `shaped`."""
    entries = native.entries(logits, row)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        entries[name] = fields[name]
    greedy = fields["temperature"] < GREEDY
    entries["flags"] = greedy * native.GREEDY | shaped * native.SHAPED | fields["processed"] * native.PROCESSED
    return entries
