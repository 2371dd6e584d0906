"""A line service that embeds AsyncLLMEngine: a client sends one JSON line and gets JSON lines back as tokens come.

    python examples/service.py [--model DIRECTORY_OR_HUB_ID] [--port 8765]
    echo '{"prompt": "def main(", "params": {"max_tokens": 8}}' | nc localhost 8765
    python examples/service.py --self-test    # the server and three clients, one of which hangs up

A line holds the index of an output and the text that it has grown by, at its end the finish reason. A client that
closes the connection before its answer is complete aborts its request, one that only closes its writing side
(`nc -N`) still gets it, and one that reads slowly gets fewer, longer lines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
from typing import Any

import msgspec

from pagefork import AsyncLLMEngine, EngineConfig, PageforkError, SamplingParams


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends; `params` are fields of SamplingParams."""

    prompt: str
    params: dict[str, Any] = {}


class Piece(msgspec.Struct, omit_defaults=True):
    """What it gets: the next text of one output, or why there is none."""

    index: int | None = None
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None


async def serve(engine: AsyncLLMEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One client. Writing to one that has gone raises ConnectionError, which leaves generate() and so aborts the request."""
    try:
        with contextlib.suppress(ConnectionError):
            await answer(engine, reader, writer)
    finally:
        writer.close()


async def answer(engine: AsyncLLMEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read a line and write the answer to it, as fast as the client reads it."""

    def write(piece: Piece) -> None:
        writer.write(msgspec.json.encode(piece) + b"\n")

    shown: dict[int, tuple[int, str | None]] = {}
    try:
        ask = msgspec.json.decode(await reader.readline(), type=Ask)
        async with contextlib.aclosing(engine.generate(ask.prompt, SamplingParams(**ask.params))) as outputs:
            async for request in outputs:
                for output in request.outputs:
                    length, _ = before = shown.get(output.index, (0, None))
                    shown[output.index] = len(output.text), output.finish_reason
                    if shown[output.index] != before:
                        write(Piece(output.index, output.text[length:], output.finish_reason))
                await writer.drain()
    except (PageforkError, msgspec.DecodeError, ValueError) as error:  # ValueError: a line that is too long, or not UTF-8
        write(Piece(error=str(error)))


async def client(port: int, ask: Ask, lines: int | None = None) -> list[Piece]:
    """Send a line, close the writing side and read the answer; or hang up after so many lines of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(msgspec.json.encode(ask) + b"\n")
    if lines is None:
        writer.write_eof()
    answers: list[Piece] = []
    while len(answers) != lines and (line := await reader.readline()):
        answers.append(msgspec.json.decode(line, type=Piece))
    writer.close()
    await writer.wait_closed()
    return answers


async def self_test(engine: AsyncLLMEngine, port: int) -> None:
    """Three clients at once, and what became of them."""
    two, one, hasty = await asyncio.gather(
        client(port, Ask("def main(", {"n": 2, "max_tokens": 12, "seed": 1})),
        client(port, Ask("import os\n", {"temperature": 0, "max_tokens": 12})),
        client(port, Ask("class Queue:\n", {"max_tokens": 900, "ignore_eos": True}), lines=3),
    )
    for name, answers in {"two outputs": two, "one output": one, "hung up": hasty}.items():
        for index in sorted({piece.index or 0 for piece in answers}):
            mine = [piece for piece in answers if piece.index == index]
            print(f"{name}: {len(mine)} lines, {mine[-1].finish_reason}: {''.join(piece.text for piece in mine)!r}")
    [refused] = await client(port, Ask("def main(", {"max_tokens": -1}))
    print(f"refused: {refused.error}")
    while (stats := await engine.stats()).num_running:
        await asyncio.sleep(0.01)
    print(f"{stats.generated_tokens} tokens generated; {stats.free_blocks} of {stats.num_blocks} cache blocks are free")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--self-test", action="store_true", help="start the server and three clients, then stop")
    arguments = parser.parse_args()
    async with AsyncLLMEngine(EngineConfig(model=arguments.model)) as engine:
        gc.freeze()  # what was loaded stays; the garbage collector would halt every client to look through it
        port = 0 if arguments.self_test else arguments.port
        server = await asyncio.start_server(
            lambda reader, writer: serve(engine, reader, writer), "127.0.0.1", port, limit=1 << 20
        )
        with contextlib.closing(server):
            port = server.sockets[0].getsockname()[1]
            print(f"listening on port {port}", flush=True)
            await (self_test(engine, port) if arguments.self_test else server.serve_forever())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
