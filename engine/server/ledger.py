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
        self._ends: deque[float] = deque(maxlen=64)

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
        """About when the next request ends, going by the last ones."""
        if len(self._ends) < 2:
            return _USUAL_MS
        return round(min(max((now - self._ends[0]) / (len(self._ends) - 1) * 1000, _LEAST_MS), _MOST_MS))

    def open(self, exchange: Exchange) -> None:
        """A request is under way."""
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
        self._ends.append(now)

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
        """A kept one is to be sent again. Raises Refusal where there is no room."""
        if exchange in self._kept:
            self.check_room(0, now)
            del self._kept[exchange]
            self._kept_bytes -= exchange.kept_bytes
            self.active[exchange] = None

    def expire(self, now: float) -> float:
        """Forget what was kept long enough; when the next one will have been."""
        while self._kept:
            exchange, until = next(iter(self._kept.items()))
            if until > now:
                return until
            self.drop(exchange)
        return float("inf")
