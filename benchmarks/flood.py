"""A stand-in for a served engine that streams made-up tokens as fast as a client takes them.

    python benchmarks/flood.py ipc:///tmp/flood 64 2000

Waits for so many requests, sends so many deltas for each, all streams in one message as after a step, and ends.
"""

from __future__ import annotations

import sys

import zmq

from pagefork.wire import (
    Accepted,
    Credit,
    Delta,
    Deltas,
    EngineMessage,
    Final,
    Finished,
    Hello,
    Ping,
    Pong,
    Submit,
    Welcome,
    decode_from_client,
    encode,
)

BOOT = "flood"


def serve(endpoint: str, streams: int, deltas: int) -> None:
    """Answer one client."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 256)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # then sending waits for the client, and drops nothing
    router.bind(endpoint)
    print("ready", flush=True)
    rids: list[str] = []
    peer = b""

    def send(message: EngineMessage) -> None:
        router.send_multipart([peer, *encode(message)])

    def hear(wait: bool) -> None:
        nonlocal peer
        if not router.poll(None if wait else 0):
            return
        peer, *frames = router.recv_multipart()
        message, _ = decode_from_client(frames)
        if isinstance(message, Hello):
            send(welcome())
        elif isinstance(message, Ping):
            send(Pong(t=message.t, boot_id=BOOT, state="running", last_step_age_ms=0, running=1, waiting=0, free_blocks=1))
        elif isinstance(message, Submit):
            rids.append(message.rid)
            send(Accepted(rid=message.rid))
        elif not isinstance(message, Credit):
            raise SystemExit  # Bye

    while len(rids) < streams:
        hear(wait=True)
    for at in range(deltas):
        send(Deltas(deltas=[Delta(rid=rid, index=0, start=at, tokens=[at], text_from=5 * at, text=" word") for rid in rids]))
        hear(wait=False)
    for rid in rids:
        send(Finished(rid=rid, outputs=[Final(index=0, start=deltas, text_from=5 * deltas, finish_reason="length")]))
    while True:
        hear(wait=True)


def welcome() -> Welcome:
    return Welcome(
        proto=1,
        boot_id=BOOT,
        session=bytes(16),
        resumed=False,
        model=BOOT,
        vocab_size=1000,
        max_model_len=1 << 20,
        limits={},
        ping_ms=5000,
        lease_ms=15000,
        grace_ms=5000,
    )


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
