"""What sessions are sent of their requests: Deltas as credit allows, and the Finished of each."""

from __future__ import annotations

from collections.abc import Callable

from pagefork import wire
from pagefork.wire import Delta

from .exchange import Exchange
from .ledger import Ledger
from .session import Line, Session

BATCH = 192 << 10  # bytes of a Deltas, about; the last piece may go beyond
BATCHES = 4  # at once for one session; the next ones have to wait, so that the others need not

_Batch = list[tuple[Exchange, Delta]]


class Courier:
    """Sends what a session may be sent.

    `fail` is told of a request that can't be encoded, and must end it. Nothing is sent twice: where a message does not go
    out, the cursors are where they were.
    """

    def __init__(self, ledger: Ledger, max_trace_bytes: int, fail: Callable[[Exchange, Exception], None]) -> None:
        self._ledger = ledger
        self._max_trace_bytes = max_trace_bytes
        self._fail = fail

    def flush(self, session: Session, now: float) -> None:
        """Send all that can be; what stays in `session.dirty` waits for the peer to read."""
        line = session.line
        if line is not None and now >= line.again:
            done = line.flush() and self._stream(session, line) and self._finish(session, line, now)
            line.rest(now)
            if done:
                return
        for exchange in session.dirty:
            if exchange.blocked is None and exchange.unsent:
                exchange.blocked = now

    def conclude(self, exchange: Exchange, now: float) -> None:
        """Send its Finished, which waits for nothing but its turn."""
        frames = self._finished(exchange)
        if exchange.session.line is not None:
            exchange.session.line.post_frames(frames)
            exchange.delivery.settle()
        self._ledger.keep(exchange, now)

    def _stream(self, session: Session, line: Line) -> bool:
        """Whether all Deltas there are went out."""
        batch: _Batch = []
        size = shipped = 0
        for exchange in list(session.dirty):
            try:
                for delta, weight in exchange.delivery.deltas(exchange.rid):
                    batch.append((exchange, delta))
                    size += weight
                    if size >= BATCH:
                        shipped += 1
                        if not self._ship(batch, line) or shipped == BATCHES:
                            return False
                        batch, size = [], 0
            except Exception as error:  # noqa: BLE001 - it is this request's failure
                self._unsend(batch)
                self._fail(exchange, error)
                return False
        return not batch or self._ship(batch, line)

    def _ship(self, batch: _Batch, line: Line) -> bool:
        try:
            sent = line.push(wire.encode(wire.Deltas(deltas=[delta for _, delta in batch])))
        except Exception as error:  # noqa: BLE001 - of one request, which is not the others' failure
            self._unsend(batch)
            self._blame(batch, error)
            return False
        if not sent:
            self._unsend(batch)
            return False
        for exchange, _ in batch:
            exchange.blocked = None
        return True

    def _unsend(self, batch: _Batch) -> None:
        for exchange, delta in reversed(batch):
            exchange.delivery.unsend(delta)

    def _blame(self, batch: _Batch, error: Exception) -> None:
        """Fail those whose Deltas can't be encoded."""
        culprits: dict[Exchange, Exception] = {}
        for exchange, delta in batch:
            try:
                wire.encode(wire.Deltas(deltas=[delta]))
            except Exception as own:  # noqa: BLE001 - see _ship
                culprits[exchange] = own
        for exchange, found in (culprits or {exchange: error for exchange, _ in batch}).items():
            self._fail(exchange, found)

    def _finish(self, session: Session, line: Line, now: float) -> bool:
        """Whether every Finished that is due went out."""
        for exchange in list(session.dirty):
            if exchange.may_finish:
                if not line.push(self._finished(exchange)):
                    return False
                exchange.delivery.settle()
                self._ledger.keep(exchange, now)
                continue
            del session.dirty[exchange]
            if not exchange.unsent:
                exchange.blocked = None
            elif exchange.blocked is None:
                exchange.blocked = now
        return True

    def _finished(self, exchange: Exchange) -> list[bytes]:
        try:
            return exchange.finished(self._max_trace_bytes)
        except Exception as error:  # noqa: BLE001 - a terminal there must be
            self._fail(exchange, error)
            return exchange.finished(self._max_trace_bytes)
