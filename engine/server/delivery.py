"""What a client has of a request's outputs, and what it may be sent next.

Outputs are cumulative and only grow, so a position in each is all that has to be remembered: there is no queue of what
was not sent, and going on elsewhere is setting the positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from pagefork.outputs import CompletionOutput, RequestOutput
from pagefork.wire import Delta, Final, Have

PIECE = 64 << 10  # bytes of a Delta, about; more where a single token has more
_TOKEN_BYTES = 5  # at most, encoded, as are the next ones
_CHARACTER_BYTES = 4
_LOGPROB_BYTES = 64
_FIELDS_BYTES = 128  # of a Delta's other fields


class _Mark(NamedTuple):
    """When an output had so many tokens, it had so many characters of text."""

    tokens: int
    characters: int


class _Cursor:
    """How far one output was sent, and its marks: the newest one, and those that credit has not come to."""

    __slots__ = ("characters", "marks", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.characters = 0
        self.marks = deque([_Mark(0, 0)])

    @property
    def behind(self) -> bool:
        end = self.marks[-1]
        return self.tokens < end.tokens or self.characters < end.characters

    def grow(self, tokens: int, characters: int, upto: int) -> int:
        """Note what there is; how many tokens are new."""
        end = self.marks[-1]
        if tokens < end.tokens or characters < end.characters:
            raise RuntimeError(
                f"an output shrank from {end.tokens} tokens, {end.characters} characters to {tokens}, {characters}"
            )
        if tokens <= upto:
            self.marks.clear()
        elif tokens == end.tokens:
            self.marks.pop()
        self.marks.append(_Mark(tokens, characters))
        return tokens - end.tokens

    def reach(self, upto: int) -> _Mark:
        """What may be sent of it: the tokens before `upto` and their text."""
        marks = self.marks
        while len(marks) > 1 and marks[1].tokens <= upto:
            marks.popleft()
        if marks[0].tokens > upto:  # the mark that belongs here was passed before the client went back
            return _Mark(upto, 0)
        return marks[0] if len(marks) == 1 else _Mark(upto, marks[0].characters)


class Delivery:
    """The newest output of a request, and a cursor for each of its completions.

    upto: tokens before this offset may be sent; of no concern where nothing is streamed. paused: the client lost its
    connection and has not said what it has.
    """

    def __init__(self, stream: bool, credit: int) -> None:
        self.stream = stream
        self.upto = credit
        self.paused = False
        self.newest: RequestOutput | None = None
        self._cursors: list[_Cursor] = []

    def put(self, output: RequestOutput) -> int:
        """Take the next output; how many tokens the completion that grew most has more. RuntimeError when one shrank."""
        if self.newest is None:
            self._cursors = [_Cursor() for _ in output.outputs]
        if len(self._cursors) != len(output.outputs):
            raise RuntimeError(f"a request with {len(self._cursors)} outputs has {len(output.outputs)}")
        self.newest = output
        grown = 0
        for cursor, one in zip(self._cursors, output.outputs, strict=True):
            grown = max(grown, cursor.grow(len(one.token_ids), len(one.text), self.upto))
        return grown

    @property
    def behind(self) -> bool:
        """Whether there is something that was not sent, and comes by Deltas."""
        return self.stream and any(cursor.behind for cursor in self._cursors)

    @property
    def tokens(self) -> int:
        """Of all outputs: that were sent, or with nothing streamed, that there are."""
        return sum(cursor.tokens if self.stream else cursor.marks[-1].tokens for cursor in self._cursors)

    def restart(self, have: Sequence[Have], credit: int) -> None:
        """Go on after what the client has. Raises ValueError, with nothing changed, where there is no such position."""
        ends = [cursor.marks[-1] for cursor in self._cursors]
        for index, has in enumerate(have):
            end = ends[index] if index < len(ends) else _Mark(0, 0)
            if has.tokens > end.tokens or has.characters > end.characters:
                raise ValueError(
                    f"output {index} has {end.tokens} tokens and {end.characters} characters of text so far; "
                    f"the client can't have {has.tokens} and {has.characters}"
                )
        for index, cursor in enumerate(self._cursors):
            has = have[index] if index < len(have) else Have()
            cursor.tokens, cursor.characters = has.tokens, has.characters
        self.upto = credit
        self.paused = False

    def deltas(self, rid: str) -> Iterator[tuple[Delta, int]]:
        """What may be sent, in pieces, and about how many bytes each has. The cursors move as they are taken."""
        if self.newest is None or not self.stream or self.paused:
            return
        for cursor, output in zip(self._cursors, self.newest.outputs, strict=True):
            while (piece := self._next(rid, cursor, output)) is not None:
                yield piece

    def _next(self, rid: str, cursor: _Cursor, output: CompletionOutput) -> tuple[Delta, int] | None:
        tokens, characters = cursor.reach(self.upto)
        start, text_from, logprobs = cursor.tokens, cursor.characters, output.logprobs
        if tokens <= start and characters <= text_from:
            return None
        weight = _TOKEN_BYTES + (_LOGPROB_BYTES * len(logprobs[start]) if logprobs and start < len(logprobs) else 0)
        if (tokens - start) * weight > PIECE:
            tokens, characters = cursor.reach(start + max(1, PIECE // weight))
        tokens = max(start, tokens)
        characters = max(text_from, min(characters, text_from + PIECE // _CHARACTER_BYTES))
        cursor.tokens, cursor.characters = tokens, characters
        delta = Delta(
            rid=rid,
            index=output.index,
            start=start,
            tokens=output.token_ids[start:tokens],
            text_from=text_from,
            text=output.text[text_from:characters],
            logprobs=None if logprobs is None else logprobs[start:tokens],
        )
        return delta, _FIELDS_BYTES + (tokens - start) * weight + (characters - text_from) * _CHARACTER_BYTES

    def unsend(self, delta: Delta) -> None:
        """Move a cursor back to where this Delta began. Several are given back in reverse order."""
        cursor = self._cursors[delta.index]
        cursor.tokens, cursor.characters = delta.start, delta.text_from

    def finals(self) -> list[Final]:
        """How each output ended, with what no Delta brought; what lies beyond the credit is cut off.

        Nothing, where nobody knows what the client has.
        """
        if self.newest is None or self.paused:
            return []
        return [self._final(cursor, one) for cursor, one in zip(self._cursors, self.newest.outputs, strict=True)]

    def settle(self) -> None:
        """Its Finished was sent as it stands: who asks for it again gets what it told of, and no more."""
        if self.newest is None or self.paused or not self.behind:
            return
        outputs = [
            _cut(cursor, one) if cursor.behind else one for cursor, one in zip(self._cursors, self.newest.outputs, strict=True)
        ]
        self.newest = msgspec.structs.replace(self.newest, outputs=outputs)
        for cursor in self._cursors:
            cursor.marks = deque([_Mark(cursor.tokens, cursor.characters)])

    def _final(self, cursor: _Cursor, output: CompletionOutput) -> Final:
        tokens, characters = (cursor.tokens, cursor.characters) if self.stream else cursor.marks[-1]
        cut = cursor.behind and self.stream
        return Final(
            index=output.index,
            start=cursor.tokens,
            tokens=output.token_ids[cursor.tokens : tokens],
            text_from=cursor.characters,
            text=output.text[cursor.characters : characters],
            logprobs=None if output.logprobs is None else output.logprobs[cursor.tokens : tokens],
            cumulative_logprob=output.cumulative_logprob,
            finish_reason="abort" if cut or output.finish_reason is None else output.finish_reason,
            stop_reason=None if cut else output.stop_reason,
            score=output.score,
        )


def _cut(cursor: _Cursor, output: CompletionOutput) -> CompletionOutput:
    """An output as far as it was sent."""
    return msgspec.structs.replace(
        output,
        text=output.text[: cursor.characters],
        token_ids=output.token_ids[: cursor.tokens],
        logprobs=None if output.logprobs is None else output.logprobs[: cursor.tokens],
        finish_reason="abort",
        stop_reason=None,
    )
