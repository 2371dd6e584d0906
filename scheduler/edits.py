"""Carrying out what a strategy decided: the five edits, on blocks, slots and tokens."""

from __future__ import annotations

import msgspec
import numpy as np

from .accounting import Trace, Usage
from .errors import PageforkError
from .group import Group, State, append_each
from .kv_manager import KVManager
from .plan import Bools, Ints, flat, ints
from .scoring import Scored
from .sequences import tally
from .slots import Slots
from .strategies.base import Ask, Drop, Edit, Emit, Finish, Grow, Ids, Read


class Update(msgspec.Struct):
    """What happened to a request in a step, in order; `scores` are of its prompt. `done`: it is over; `error`: why it failed.

    `usage` and `trace` come with the last one.
    """

    request_id: str
    events: list[Emit | Finish] = []
    asks: list[Ask] = []
    scores: list[Scored] = []
    done: bool = False
    cached_tokens: int = 0
    preemptions: int = 0
    usage: Usage | None = None
    trace: Trace | None = None
    error: PageforkError | None = None


class Editor:
    """Takes the edits of all groups in a step, and carries out what they mean for blocks and slots in one go: `flush`."""

    def __init__(self, kv: KVManager, slots: Slots) -> None:
        self._kv = kv
        self._slots = slots
        self.emitted = 0  # tokens, since the start
        self._groups: dict[int, Group] = {}
        self._rounds: list[list[tuple[Group, Grow]]] = []  # the first Grow of each group, the second of each, ...
        self._reads: list[Ids] = []  # what was read and may have to be parked
        self._grown: list[Ids] = []
        self._drops: list[Ids] = []
        self._lost: list[tuple[Group, int]] = []  # how many sequences each group drops

    def apply(self, group: Group, edits: list[Edit], update: Update, read: Ids = (), children: Ids = ()) -> None:
        """Take what a group's strategy decided after `read` was read, and read for `children` too.

        Raises RuntimeError for edits that can't be carried out; nothing of them will be.
        """
        if group.number in self._groups:
            self.flush()
        grows: list[Grow] = []
        drops: list[Ids] = []
        asks: list[Ask] = []
        for edit in edits:
            if isinstance(edit, Emit):
                self.emitted += len(edit.tokens)
                update.events.append(edit)
            elif isinstance(edit, Grow):
                grows.append(edit)
            elif isinstance(edit, Drop):
                if len(edit.seqs):
                    drops.append(edit.seqs)
            elif isinstance(edit, Finish):
                group.unfinished.discard(edit.index)
                update.events.append(edit)
            else:
                asks.append(edit)
        pipelined = group.strategy.pipelined
        if asks or not pipelined:
            self._check(group, grows, drops, asks, read)
            group.asked |= bool(asks)
            update.asks += asks
        self._groups[group.number] = group
        for nth, grow in enumerate(grows):
            if nth == len(self._rounds):
                self._rounds.append([])
            self._rounds[nth].append((group, grow))
            if grow.run:
                group.expect += len(grow.src)
            if grow.text is not None:
                group.text.update(zip(map(int, grow.dst), grow.text, strict=True))
        if drops or not pipelined or not grows:
            self._let_go(group, grows, drops, [read, children] if len(children) else [read])

    def _let_go(self, group: Group, grows: list[Grow], drops: list[Ids], reads: list[Ids]) -> None:
        """What was read and is not grown, and what is dropped."""
        self._reads += reads
        for grow in grows:
            if grow.run:
                self._grown.append(grow.dst)
        for drop in drops:
            self._drops.append(drop)
            self._lost.append((group, len(drop)))

    def _check(self, group: Group, grows: list[Grow], drops: list[Ids], asks: list[Ask], read: Ids) -> None:
        if len(asks) + group.asked > 1:
            raise RuntimeError("an Ask while another is out: a group has one at a time")
        for grow in grows:
            if not len(grow.src) == len(grow.token) == len(grow.dst):
                raise RuntimeError(f"a Grow of {len(grow.src)} src, {len(grow.token)} token and {len(grow.dst)} dst")
        running = sum(len(grow.dst) for grow in grows if grow.run)
        if not group.strategy.lockstep and running > len(read):
            table = self._kv.table
            seqs = table.of(group.number)
            left = set(seqs[table.run[seqs]].tolist()).difference(read, *drops)
            running = len(left.union(*(grow.dst for grow in grows if grow.run)))
        if running > group.width:
            raise RuntimeError(f"{running} sequences run, which is more than its footprint says: {group.width}")

    def flush(self) -> None:
        """Carry out what was taken.

        Forks share before anything is dropped; what is dropped, or was read and not grown, gives its slot before forks take
        any. A source that gives up its slot keeps its number in the forks: a plan reads all sources before it writes.
        """
        if not self._groups:
            return
        rounds, self._rounds = self._rounds, []
        forks = [fork for part in rounds if (fork := self._grow(part)) is not None]
        if self._reads:
            self._release()
        for slots, dst in forks:
            self._slots.fork(slots, dst)
        self._groups = {}

    def _grow(self, part: list[tuple[Group, Grow]]) -> tuple[Ints, Ints] | None:
        """Carry out one Grow of each of several groups; source slots and sequences of those that need a slot."""
        table = self._kv.table
        src = flat([grow.src for _, grow in part])
        tokens = flat([grow.token for _, grow in part])
        counts = [len(grow.src) for _, grow in part]
        trees = [group.tokens for group, _ in part]
        if all(grow.dst is grow.src and group.strategy.pipelined for group, grow in part):  # never parked: all have slots
            table.known[src] += 1
            table.last[src] = tokens
            table.node[src] = append_each(trees, counts, table.node[src], tokens)
            return None
        dst = flat([grow.dst for _, grow in part])
        fresh = src != dst
        if fresh.any():
            self._fork(part, counts, src, dst, fresh)
        table.known[dst] += 1
        table.last[dst] = tokens
        table.node[dst] = append_each(trees, counts, table.node[src], tokens) if len(dst) else ints()
        wanted = fresh | (table.slot[dst] < 0)
        if (runs := [grow.run for _, grow in part]).count(True) == len(part):
            table.run[dst] = True
        else:
            table.run[dst] = run = np.repeat(runs, counts)
            wanted &= run
        # A group that was preempted with a read in flight gets its slots when it is back.
        if (here := [group.state is State.RUNNING for group, _ in part]).count(True) < len(part):
            wanted &= np.repeat(here, counts)
        return table.slot[src[wanted]], dst[wanted]

    def _fork(self, part: list[tuple[Group, Grow]], counts: list[int], src: Ints, dst: Ints, fresh: Bools) -> None:
        table = self._kv.table
        forked = np.concatenate(([0], np.cumsum(fresh)))
        streams = table.stream[src]
        end, before = 0, 0
        for (group, grow), count, after in zip(part, counts, forked[np.cumsum(counts)].tolist(), strict=True):
            begin, end = end, end + count
            group.usage.forks += after - before
            before = after
            if grow.stream is not None:
                streams[begin:end] = grow.stream
        self._kv.fork(src[fresh], dst[fresh])
        table.stream[dst[fresh]] = streams[fresh]

    def _release(self) -> None:
        """Park what was read and not grown; let go what was dropped."""
        table = self._kv.table
        dropped = flat(self._drops)
        idle = np.zeros(len(table.alive), np.bool_)
        idle[flat(self._reads)] = True
        idle[flat(self._grown)] = False
        idle[dropped] = False
        parked = ints(np.flatnonzero(idle))
        if len(parked):
            table.run[parked] = False
            self._slots.close(parked)
        self._reads, self._grown, self._drops = [], [], []
        if not len(dropped):
            return
        self._slots.close(dropped)
        lost, self._lost = self._lost, []
        for group, count in lost:
            group.live -= count
            if group.text:
                gone = set(dropped.tolist())
                group.text = {seq: state for seq, state in group.text.items() if seq not in gone}
        freed = self._kv.drop(dropped)
        for number, count in tally(freed) if len(freed) else ():
            if self._groups[number].unfinished:
                self._groups[number].usage.blocks_freed += count


def fork_now(kv: KVManager, slots: Slots, group: Group, read: Read) -> list[int]:
    """Fork the sequences of a Read that are new, inside the plan: several draws from one row. Who they are."""
    assert read.seqs is not None
    table = kv.table
    seqs = ints(read.seqs)
    new = table.known[seqs] == 0
    if not new.any():
        return []
    src, dst = ints(read.at)[new], seqs[new]
    of = table.of(group.number)
    if (running := int(np.count_nonzero(table.slot[of] >= 0)) + len(dst)) > group.width:
        raise RuntimeError(f"{running} sequences run, which is more than its footprint says: {group.width}")
    kv.fork(src, dst)
    group.usage.forks += len(dst)
    table.stream[dst] = table.stream[src] if read.stream is None else np.asarray(read.stream, np.int64)[new]
    slots.open(dst)
    children: list[int] = dst.tolist()
    if group.text:
        for source, child in zip(src.tolist(), children, strict=True):
            if source in group.text:
                group.text[child] = group.text[source]
    return children


def going_on(kv: KVManager) -> set[int]:
    """Numbers of the groups that have something to compute, or a read-out in flight."""
    table = kv.table
    busy = table.alive & table.run & ((table.known > table.scheduled) | (table.pending > 0))
    return set(np.unique(table.group[busy]).tolist())
