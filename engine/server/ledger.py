"""The requests of all sessions: those under way within their limits, and those that ended, kept for who asks again."""

from __future__ import annotations

from collections import deque

from pagefork.limits import Limits
from pagefork.wire import Code

from .exchange import Exchange
from .submission import Refusal

_LEAST_MS, _USUAL_MS, _MOST_MS = 100, 1000, 10_000


class Ledger:
    """Requests under way until their Finished is sent, then kept for `keep` seconds; bounded by `limits`."""

    def __init__(self, limits: Limits, keep: float) -> None:
        self.active: dict[Exchange, None] = {}
        self.reserved = 0
        self._limits = limits
        self._keep = keep
        self._kept: dict[Exchange, float] = {}  # until when; the first was kept longest
        self._kept_bytes = 0
        self._gaps: deque[float] = deque(maxlen=64)
        self._last = 0.0  # when a request ended, or the first of all came

    def check_room(self, tokens: int, now: float) -> None:
        """Raise Refusal where a request of so many prompt tokens is more than the limits have room for."""
        if tokens > self._limits.max_reserved_tokens:
            raise Refusal(
                Code.TOO_LARGE,
                f"the prompt may have {tokens} tokens; this service's limit is {self._limits.max_reserved_tokens} for all "
                "requests (max_reserved_tokens)",
            )
        if len(self.active) >= self._limits.max_requests:
            raise Refusal(Code.QUEUE_FULL, f"there are {len(self.active)} requests (max_requests)", self.retry_after_ms(now))
        if self.reserved + tokens > self._limits.max_reserved_tokens:
            raise Refusal(
                Code.QUEUE_FULL,
                f"the prompts of all requests have up to {self.reserved} tokens, this one {tokens}; the limit is "
                f"{self._limits.max_reserved_tokens} (max_reserved_tokens)",
                self.retry_after_ms(now),
            )

    def retry_after_ms(self, now: float) -> int:
        """About when the next request ends, going by how long it took from one end to the next while there were any."""
        if not self._gaps:
            return _USUAL_MS
        mean = (sum(self._gaps) + now - self._last) / len(self._gaps)
        return round(min(max(mean * 1000, _LEAST_MS), _MOST_MS))

    def open(self, exchange: Exchange) -> None:
        """A request is under way."""
        if not self.active:
            self._last = exchange.arrived
        self.active[exchange] = None
        exchange.session.exchanges[exchange.rid] = exchange
        self.reserved += exchange.reserved

    def count(self, exchange: Exchange, tokens: int) -> None:
        """Its prompt has so many tokens."""
        self.reserved += tokens - exchange.reserved
        exchange.reserved = tokens
        exchange.counted = True

    def release(self, exchange: Exchange, now: float) -> None:
        """The engine is through with it."""
        self.count(exchange, 0)
        self._gaps.append(now - self._last)
        self._last = now

    def drop(self, exchange: Exchange) -> None:
        """Forget a request, whatever became of it."""
        self.active.pop(exchange, None)
        if self._kept.pop(exchange, None) is not None:
            self._kept_bytes -= exchange.kept_bytes
        self.count(exchange, 0)
        exchange.session.dirty.pop(exchange, None)
        if exchange.session.exchanges.get(exchange.rid) is exchange:
            del exchange.session.exchanges[exchange.rid]

    def keep(self, exchange: Exchange, now: float) -> None:
        """Its Finished was sent."""
        self.active.pop(exchange, None)
        exchange.session.dirty.pop(exchange, None)
        exchange.blocked = None
        exchange.kept_bytes = exchange.size()
        self._kept[exchange] = now + self._keep
        self._kept_bytes += exchange.kept_bytes
        while self._kept_bytes > self._limits.max_kept_bytes:
            self.drop(next(iter(self._kept)))

    def revive(self, exchange: Exchange, now: float) -> None:
        """A kept one is to be sent again, also where there is no room for new ones: it was accepted, and its client may lack its
        end. Raises Refusal for too many bytes.
        """
        if exchange in self._kept:
            self._check_replay(exchange, now)
            del self._kept[exchange]
            self._kept_bytes -= exchange.kept_bytes
            self.active[exchange] = None

    def _check_replay(self, exchange: Exchange, now: float) -> None:
        """Raise Refusal for who asks again and again: it costs no computing, and a peer that does not read fills the memory."""
        session, most = exchange.session, self._limits.max_kept_bytes
        session.replayed = max(0.0, session.replayed - (now - session.replayed_at) * most / self._keep)
        session.replayed_at = now
        if session.replayed + exchange.kept_bytes > most:
            wait = min((session.replayed + exchange.kept_bytes - most) * self._keep / most, self._keep)
            raise Refusal(
                Code.QUEUE_FULL,
                f"this session was sent {round(session.replayed)} bytes again in the last {self._keep:g} s; {most} are allowed "
                "(max_kept_bytes)",
                max(_LEAST_MS, round(1000 * wait)),
            )
        session.replayed += exchange.kept_bytes

    def expire(self, now: float) -> float:
        """Forget what was kept long enough; when the next one will have been."""
        while self._kept:
            exchange, until = next(iter(self._kept.items()))
            if until > now:
                return until
            self.drop(exchange)
        return float("inf")
