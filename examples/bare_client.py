"""A client of the service that imports nothing of Pagefork: streams one completion over ZeroMQ, with msgpack.

    pagefork serve --model demo &
    python examples/bare_client.py [ENDPOINT] [PROMPT]

docs/protocol.md tells the rules. Give a token for a TCP endpoint in PAGEFORK_TOKEN.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

HELLO, SUBMIT, CREDIT, PING, BYE = 1, 2, 3, 6, 8
WELCOME, DELTAS, FINISHED, GOAWAY, ERROR = 128, 130, 131, 134, 135
WINDOW = 64  # tokens that the engine may be ahead


def default_endpoint() -> str:
    user = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = f"{user}/pagefork" if user and Path(user).is_dir() else f"{tempfile.gettempdir()}/pagefork-{os.geteuid()}"
    return f"ipc://{os.environ.get('PAGEFORK_RUNTIME_DIR') or folder}/default.ipc"


def main() -> None:
    endpoint = sys.argv[1] if len(sys.argv) > 1 else default_endpoint()
    prompt = sys.argv[2] if len(sys.argv) > 2 else "def main("
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint)

    def send(kind: int, **body: Any) -> None:
        socket.send_multipart([struct.pack("<4sBBH", b"PGFK", 1, kind, 0), msgspec.msgpack.encode(body)])

    def receive(seconds: float) -> tuple[int, dict[str, Any]] | None:
        if not socket.poll(int(seconds * 1000)):
            return None
        header, body = socket.recv_multipart()[:2]
        return struct.unpack("<4sBBH", header)[2], msgspec.msgpack.decode(body)

    send(HELLO, client="bare", token=os.environ.get("PAGEFORK_TOKEN"))
    kind, welcome = receive(10) or sys.exit(f"nobody answers at {endpoint}")
    if kind != WELCOME:
        sys.exit(f"not welcome: {welcome}")
    params = {"type": "sampling", "temperature": 0.0, "max_tokens": 100}
    send(SUBMIT, rid="one", text=prompt, params=params, credit=WINDOW)
    print(prompt, end="")
    granted, ping_at = WINDOW, 0.0
    while True:
        if time.monotonic() >= ping_at:  # or the engine takes this client for dead
            send(PING)
            ping_at = time.monotonic() + welcome["ping_ms"] / 1000
        kind, body = receive(ping_at - time.monotonic()) or (0, {})
        if kind in (DELTAS, FINISHED):
            for delta in body["deltas"] if kind == DELTAS else body["outputs"]:
                print(delta.get("text", ""), end="", flush=True)
                read = delta["from"] + len(delta.get("tokens", []))
                if granted - read < WINDOW / 2 and kind == DELTAS:
                    granted = read + WINDOW
                    send(CREDIT, rid="one", upto=granted)
        if kind in (FINISHED, GOAWAY, ERROR):
            break
    ending = body["outputs"][0]["finish_reason"] if kind == FINISHED and "error" not in body else body
    print(f"\n[{ending}]")
    send(BYE)
    socket.close(linger=1000)


if __name__ == "__main__":
    main()
