"""Client and AsyncClient with a served engine in a process of its own: what they return is what the engine in process does."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
from support.serving_process import GONE_WITHIN, configured, serving

from pagefork import (
    LLM,
    AsyncClient,
    BeamSearchParams,
    Client,
    ConfigError,
    ContrastiveSearchParams,
    InvalidRequestError,
    MCTSParams,
    RequestOutput,
    SamplingParams,
    ServiceError,
)
from pagefork.client.stream import Stream
from pagefork.limits import Limits
from pagefork.scheduler.errors import EngineMisuseError
from pagefork.scheduler.params import CommonParams
from pagefork.wire import Code, Delta

PROMPT = "def read_lines(path):\n"
LONG = SamplingParams(max_tokens=400, ignore_eos=True, seed=7)
SOME = LONG.replace(max_tokens=60)
STRATEGIES: list[CommonParams] = [
    SamplingParams(temperature=0, max_tokens=24, logprobs=2, prompt_logprobs=1, stop=["\n\n"]),
    SamplingParams(n=3, best_of=4, seed=3, max_tokens=20),
    BeamSearchParams(beam_width=4, n=2, max_tokens=12),
    ContrastiveSearchParams(max_tokens=8, top_k=3, trace=True),
    MCTSParams(num_simulations=8, max_tokens=4, seed=1, value_fn="brackets_balance", trace=True),
]


@pytest.fixture(scope="module")
def name() -> Iterator[str]:
    """The name of an engine that is served as long as this module's tests run."""
    with serving():
        yield "default"


@pytest.fixture
def client(name: str) -> Iterator[Client]:
    with Client(name) as client:
        yield client


def told(output: RequestOutput) -> Any:
    """What an output says of the request, but for its id and times."""
    fields = msgspec.to_builtins(msgspec.structs.replace(output, error=None), builtin_types=(), str_keys=True)
    del fields["request_id"]
    for key in ("arrival_time", "first_token_time", "finished_time", "cached_tokens"):
        del fields["metrics"][key]
    return fields


@pytest.mark.parametrize("params", STRATEGIES, ids=lambda params: type(params).__name__)
def test_outputs_are_those_of_the_engine_in_process_streamed_or_not(client: Client, demo: LLM, params: CommonParams) -> None:
    [expected] = demo.generate(PROMPT, params, use_tqdm=False)
    at_once = client.generate(PROMPT, params)
    deltas = list(stream := client.stream(PROMPT, params))
    assert told(at_once) == told(stream.result()) == told(expected)
    for output in expected.outputs:
        mine = [delta for delta in deltas if delta.index == output.index]
        assert [token for delta in mine for token in delta.tokens] == output.token_ids
        assert "".join(delta.text for delta in mine) == output.text
    metrics = at_once.metrics
    assert metrics.first_token_time is not None and metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time <= time.monotonic()


def test_a_list_of_prompts_of_either_kind_comes_back_in_its_order_and_a_single_one_alone(client: Client, demo: LLM) -> None:
    params = [SamplingParams(seed=seed, max_tokens=4 + seed) for seed in range(12)]
    texts = [f"x = {number}" for number in range(12)]
    expected = [output.outputs for output in demo.generate(texts, params, use_tqdm=False)]
    assert [output.outputs for output in client.generate(texts, params)] == expected
    ids = [output.prompt_token_ids for output in demo.generate(texts, SamplingParams(max_tokens=1), use_tqdm=False)]
    by_ids = client.generate(ids, params)
    assert [output.outputs for output in by_ids] == expected
    assert [(output.prompt, output.prompt_token_ids) for output in by_ids] == [(None, mine) for mine in ids]
    alone = client.generate(ids[3], params[3], request_id="mine")
    assert alone.outputs == expected[3] and alone.request_id == "mine"


def test_what_cannot_be_sent_is_refused_before_it_is(client: Client) -> None:
    refused = client.stats().service.accepted
    wrong: list[tuple[Any, Any, dict[str, Any]]] = [
        (PROMPT, MCTSParams(value_fn=lambda leaves: [0.0 for _ in leaves]), {}),
        (PROMPT, SamplingParams(logits_processors=[lambda prompt, output, logits: logits]), {}),
        (PROMPT, {"max_tokens": 3}, {}),
        ("\ud800", None, {}),
        ([1, -1], None, {}),
        ([1, "a"], None, {}),
        ([], None, {}),
        (PROMPT, None, {"request_id": "no spaces"}),
        (PROMPT, None, {"priority": 2**40}),
        (PROMPT, None, {"deadline": 0}),
        ([PROMPT], [None, None], {}),
        ([PROMPT], None, {"request_id": "one name for all"}),
    ]
    for prompt, params, fields in wrong:
        with pytest.raises(InvalidRequestError):
            client.generate(prompt, params, **fields)
    with pytest.raises(ServiceError) as caught:
        client.generate("x" * (8 << 20 | 1))
    assert caught.value.code == Code.TOO_LARGE
    assert client.stats().service.accepted == refused


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [
        (PROMPT, SamplingParams(n=129), Code.TOO_LARGE),
        ([10**6], None, Code.INVALID_ARGUMENT),
        (PROMPT, MCTSParams(value_fn="no_such_function"), Code.INVALID_ARGUMENT),
    ],
)
def test_what_the_service_refuses_raises_its_code_for_one_prompt_and_for_a_list(
    client: Client, prompt: Any, params: CommonParams, code: Code
) -> None:
    for prompts in (prompt, [prompt, prompt]):
        with pytest.raises(ServiceError) as caught:
            client.generate(prompts, params)
        assert caught.value.code == code and not caught.value.retry_safe


def test_a_request_that_fails_raises_with_what_there_was_and_in_a_list_carries_its_error(client: Client) -> None:
    slow = SamplingParams(max_tokens=400, ignore_eos=True, n=8, seed=1)
    with pytest.raises(ServiceError) as caught:
        client.generate(PROMPT, slow, deadline=0.2)
    output = caught.value.output
    assert caught.value.code == Code.DEADLINE and isinstance(output, RequestOutput) and output.finished
    late, fine = client.generate([PROMPT, PROMPT], [slow, SamplingParams(max_tokens=2)], deadline=0.3)
    assert isinstance(late.error, ServiceError) and late.error.code == Code.DEADLINE and fine.error is None


def test_a_reader_that_stops_holds_a_window_of_tokens_and_holds_up_nobody(name: str, demo: LLM) -> None:
    [expected] = demo.generate(PROMPT, SOME, use_tqdm=False)
    with Client(name, window=16) as client, client.stream(PROMPT, SOME) as stream:
        read = [next(stream)]
        assert client.generate("import os", SamplingParams(max_tokens=30, ignore_eos=True)).outputs[0].token_ids
        time.sleep(0.3)
        buffered = sum(len(event.tokens) for event in stream._mailbox._events if isinstance(event, Delta))
        assert len(read[0].tokens) + buffered <= 16
        read += stream
        assert [token for delta in read for token in delta.tokens] == expected.outputs[0].token_ids


def free(client: Client) -> bool:
    """Whether the engine soon has no request and every block back."""
    until = time.monotonic() + GONE_WITHIN
    while time.monotonic() < until:
        stats = client.stats()
        if stats.service.requests == 0 and stats.engine.free_blocks == stats.engine.num_blocks:
            return True
        time.sleep(0.02)
    return False


def test_an_aborted_request_ends_as_the_engine_in_process_ends_it(client: Client) -> None:
    stream = client.stream(PROMPT, LONG)
    next(stream)
    stream.abort()
    [output] = stream.result().outputs
    assert output.finish_reason == "abort" and 0 < len(output.token_ids) < 400
    assert free(client)


def test_what_is_aborted_before_it_was_accepted_is_finished_without_outputs(client: Client) -> None:
    stream = client.stream(PROMPT * 20, LONG)
    stream.abort()
    output = stream.result()
    assert output.finished and not any(one.token_ids for one in output.outputs)
    assert free(client)


def test_a_stream_that_is_left_closed_or_dropped_frees_its_blocks(client: Client) -> None:
    with client.stream(PROMPT, LONG) as stream:
        next(stream)
    assert free(client) and list(stream) == []
    for _ in client.stream(PROMPT, LONG):
        break
    gc.collect()
    assert free(client)


def test_closing_a_stream_wakes_the_thread_that_waits_for_it(client: Client) -> None:
    stream = client.stream(PROMPT, LONG.replace(n=8))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, stream)
        time.sleep(0.1)
        stream.close()
        reading.result(10)
    assert free(client)


def test_two_clients_may_use_one_name_for_their_requests(name: str) -> None:
    with Client(name) as one, Client(name) as two:
        streams = [client.stream(PROMPT, SOME.replace(seed=seed), request_id="mine") for seed, client in enumerate((one, two))]
        outputs = [stream.result().outputs[0].token_ids for stream in streams]
    assert outputs[0] != outputs[1] and len(outputs[0]) == len(outputs[1]) == 60


def test_a_name_that_is_under_way_is_refused_and_one_that_has_ended_is_answered_again(client: Client) -> None:
    with client.stream(PROMPT, LONG, request_id="a"), pytest.raises(ServiceError, match="DUPLICATE"):
        client.generate(PROMPT, request_id="a")
    params = SamplingParams(max_tokens=8)
    first, again = (client.generate(PROMPT, params, request_id="b") for _ in range(2))
    assert first.outputs == again.outputs
    with pytest.raises(ServiceError, match="DUPLICATE"):
        client.generate("another prompt", params, request_id="b")


@pytest.mark.parametrize("leave", [Stream.close, Stream.abort, Stream.__del__])
def test_a_stream_that_was_refused_for_its_name_or_is_over_does_not_end_the_other_one_of_that_name(
    client: Client, leave: Callable[[Stream], None]
) -> None:
    with client.stream(PROMPT, SOME, request_id="twice") as stream:
        leave(client.stream(PROMPT, SOME, request_id="twice"))
        assert len(stream.result().outputs[0].token_ids) == 60
    over = client.stream(PROMPT, SOME, request_id="again")
    while client.stats().service.requests:
        time.sleep(0.01)
    stream = client.stream(PROMPT, SOME, request_id="again")
    leave(over)
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(stream.result).result(10).outputs[0].token_ids) == 60


def test_what_no_hello_or_attach_can_say_is_refused_at_once(client: Client) -> None:
    wrong: list[dict[str, Any]] = [{"name": "no spaces"}, {"token": "x" * 257}, {"session": "text"}, {"session": bytes(65)}]
    for fields in wrong:
        with pytest.raises(ConfigError, match="can't be sent"):
            Client("nobody", **fields)
    for rid in ("no spaces", 5):
        with pytest.raises(InvalidRequestError):
            client.attach(rid)  # type: ignore[arg-type]


def test_a_subclass_of_str_is_a_text(client: Client) -> None:
    params = SamplingParams(max_tokens=4, seed=1)
    assert client.generate(np.str_(PROMPT), params).outputs == client.generate(PROMPT, params).outputs


def test_a_list_longer_than_the_queue_runs_as_many_at_once_as_there_is_room_for_and_keeps_its_deadline() -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with serving(configured(limits=Limits(max_requests=4))), Client() as client:
        assert [len(one.outputs[0].token_ids) for one in client.generate(["a"] * 40, params)] == [4] * 40
        refused = client.stats().service.refused["QUEUE_FULL"]
        assert refused < 400  # 36 + 32 + 28 + ...; one after the other it were fewer, and slower
        with Client() as other:
            held = [other.stream(PROMPT, LONG) for _ in range(4)]
            for stream in held:
                stream.accepted()
            begun = time.monotonic()
            outputs = client.generate(["a", "b"], params, deadline=0.3)
            assert 0.2 < time.monotonic() - begun < 2
        for output in outputs:
            assert isinstance(output.error, ServiceError) and output.error.code == Code.DEADLINE and output.finished


def test_another_client_of_the_session_goes_on_with_its_requests(name: str, demo: LLM) -> None:
    [expected] = demo.generate(PROMPT, SOME, use_tqdm=False)
    first = Client(name)
    stream = first.stream(PROMPT, SOME, request_id="a")
    next(stream)
    session = first.session
    first.close(keep_session=True)
    with Client(name, session=session) as second:
        assert second.welcome is not None and second.welcome.resumed
        output = second.attach("a").result()
        assert output.outputs == expected.outputs and output.prompt_token_ids == expected.prompt_token_ids
        with pytest.raises(ServiceError, match="no request"):
            second.attach("b").result()


def test_health_and_stats_and_limits_are_told(client: Client) -> None:
    pong, welcome = client.health(), client.welcome
    assert welcome is not None and pong.boot_id == welcome.boot_id and pong.state == "running"
    assert (welcome.model, welcome.max_model_len, welcome.limits["max_n"]) == ("demo", 512, 128)
    before = client.stats()
    client.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    after = client.stats()
    assert after.engine.generated_tokens - before.engine.generated_tokens == 5
    assert after.service.accepted - before.service.accepted == 1


def test_many_threads_share_a_client(client: Client, demo: LLM) -> None:
    params = [SamplingParams(seed=seed, max_tokens=10) for seed in range(16)]
    expected = [output.outputs for output in demo.generate([PROMPT] * 16, params, use_tqdm=False)]
    with ThreadPoolExecutor(16) as pool:
        assert [output.outputs for output in pool.map(lambda mine: client.generate(PROMPT, mine), params)] == expected


def test_an_interrupt_ends_the_call_and_its_request_and_leaves_the_client_usable(client: Client) -> None:
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        client.generate([PROMPT] * 4, LONG.replace(n=8))
    assert free(client)
    assert client.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].finish_reason == "length"


def test_a_closed_client_says_so_and_its_streams_end(name: str) -> None:
    client = Client(name)
    stream = client.stream(PROMPT, LONG)
    next(stream)
    client.close()
    client.close()
    with pytest.raises(ServiceError, match="the client was closed"):
        list(stream)
    with pytest.raises(EngineMisuseError, match="closed"):
        client.generate(PROMPT)


def script(code: str) -> str:
    """What a program prints that ends by itself."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30, env={**os.environ})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_program_that_ends_without_closing_does_not_hang_and_its_requests_end(client: Client) -> None:
    code = f"""
from pagefork import Client, SamplingParams
stream = Client().stream({PROMPT!r}, SamplingParams(max_tokens=400, ignore_eos=True))
print(len(next(stream).tokens) > 0)
"""
    assert script(code) == "True\n"
    assert free(client)


def test_a_client_in_a_forked_process_says_that_it_belongs_to_another(name: str) -> None:
    code = f"""
import os
from pagefork import Client, SamplingParams
client = Client()
stream = client.stream({PROMPT!r}, SamplingParams(max_tokens=100, ignore_eos=True))
if (child := os.fork()) == 0:
    for call in (client.health, lambda: next(stream), lambda: client.stream("x")):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, "after a fork" in str(error), flush=True)
    del stream, client
    os._exit(0)
os.waitpid(child, 0)
print(len(stream.result().outputs[0].token_ids))
"""
    assert script(code) == "EngineMisuseError True\n" * 3 + "100\n"


def test_the_same_in_an_event_loop(name: str, demo: LLM) -> None:
    params = [*STRATEGIES[:2], SOME]
    expected = [output.outputs for output in demo.generate([PROMPT] * 3, params, use_tqdm=False)]

    async def read(client: AsyncClient, mine: CommonParams) -> Any:
        async with client.stream(PROMPT, mine) as stream:
            assert (await stream.accepted()).rid == stream.request_id
            deltas = [delta async for delta in stream]
            assert sum(len(delta.tokens) for delta in deltas if delta.index == 0) > 0
            return (await stream.result()).outputs

    async def main() -> None:
        async with AsyncClient(name) as client:
            assert await asyncio.gather(*(read(client, mine) for mine in params)) == expected
            assert [output.outputs for output in await client.generate([PROMPT] * 3, params)] == expected
            with pytest.raises(ServiceError, match="TOO_LARGE"):
                await client.stream(PROMPT, SamplingParams(n=129)).accepted()
            task = asyncio.create_task(client.generate(PROMPT, LONG.replace(n=8)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.health()).state == "running"
        with pytest.raises(EngineMisuseError, match="closed"):
            await client.health()

    asyncio.run(main())
    with Client(name) as client:
        assert free(client)


def test_a_loop_that_was_closed_with_requests_under_way_loses_them(name: str) -> None:
    async def main() -> AsyncClient:
        client = AsyncClient(name)
        await client.stream(PROMPT, LONG).accepted()
        client.stream(PROMPT, LONG)
        return client

    kept = asyncio.run(main())
    with Client(name) as client:
        assert free(client)
    del kept
