"""A live board for a terminal: one panel per output, redrawn while the batch runs."""

from __future__ import annotations

import math
import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagefork.cli.text import label, printable
from pagefork.cli.view import output_name, score_of
from pagefork.outputs import CompletionOutput, RequestOutput

REFRESH = 0.08  # seconds between two frames
WIDE = 110  # terminal columns from which two panels stand side by side
LOWEST = 4  # lines of a panel, its border included

Key = tuple[int, int]  # prompt, output


class Board:
    """Shows where every output is; in the end the board gives way to the whole texts."""

    def __init__(self, prompts: list[str], n: int) -> None:
        self._prompts, self._n = prompts, n
        self._outputs: dict[Key, CompletionOutput | None] = {(i, j): None for i in range(len(prompts)) for j in range(n)}
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._start = self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if error[0] is None:
            for key in self._outputs:
                completion = self._outputs[key]
                score = score_of(completion) if completion else ""
                title = Text(f"{output_name(*key, self._n)}{score} {label(self._prompts[key[0]])}")
                self._console.rule(title, align="left", style="dim")
                self._console.print(self._text(key), soft_wrap=True)

    def show(self, index: int, output: RequestOutput) -> None:
        for completion in output.outputs:
            self._outputs[index, completion.index] = completion
        now = time.monotonic()
        if now - self._drawn >= REFRESH:
            self._drawn = now
            self._live.update(self._frame(now), refresh=True)

    def _frame(self, now: float) -> Table:
        """As many panels as fit; when not all do, those that still run come first."""
        width, height = self._console.size
        columns = 2 if width >= WIDE and len(self._outputs) > 1 else 1
        rows = min(math.ceil(len(self._outputs) / columns), max(1, (height - 2) // LOWEST))
        tall = max(LOWEST, (height - 2) // rows)
        shown = sorted(sorted(self._outputs, key=self._has_finished)[: rows * columns])
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for at in range(0, len(shown), columns):
            grid.add_row(*(self._panel(key, width // columns, tall) for key in shown[at : at + columns]))
        grid.add_row(Text(self._status(now - self._start), style="dim"))
        return grid

    def _panel(self, key: Key, width: int, height: int) -> Panel:
        """The last lines of an output."""
        completion = self._outputs[key]
        state = "waiting"
        if completion is not None:
            state = f"{completion.finish_reason or f'{len(completion.token_ids)} tokens'}{score_of(completion)}"
        text = self._text(key)
        text.rstrip()
        lines = text.wrap(self._console, width - 4, tab_size=4)
        return Panel(
            Text("\n").join(lines[2 - height :]),
            title=Text(f"{output_name(*key, self._n)} {state}"),
            title_align="left",
            height=height,
            border_style="green" if self._has_finished(key) else "dim",
        )

    def _text(self, key: Key) -> Text:
        """Prompt and output, the prompt dimmed."""
        completion = self._outputs[key]
        return Text.assemble((printable(self._prompts[key[0]]), "dim"), printable(completion.text if completion else ""))

    def _has_finished(self, key: Key) -> bool:
        completion = self._outputs[key]
        return completion is not None and completion.finish_reason is not None

    def _status(self, seconds: float) -> str:
        tokens = sum(len(completion.token_ids) for completion in self._outputs.values() if completion)
        finished = sum(map(self._has_finished, self._outputs))
        return f"{finished} of {len(self._outputs)} finished · {tokens} tokens · {tokens / seconds:.0f} tokens/s"
