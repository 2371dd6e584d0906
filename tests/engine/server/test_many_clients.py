"""Many clients of a served engine at once, with all strategies."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import msgspec
from support.served_requests import python, tokens_of

from pagefork import LLM, SamplingParams
from pagefork.scheduler.params import CommonParams
from pagefork.scheduler.search_params import BeamSearchParams, ContrastiveSearchParams, MCTSParams
from pagefork.server.launch import Served

STRATEGIES: list[CommonParams] = [
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1),
    SamplingParams(seed=2, n=3, max_tokens=8),
    SamplingParams(seed=3, n=2, best_of=3, max_tokens=6),
    BeamSearchParams(beam_width=3, n=2, max_tokens=6),
    ContrastiveSearchParams(top_k=3, max_tokens=6),
    MCTSParams(num_simulations=4, top_k=2, leaf_batch_size=2, max_depth=2, max_tokens=3, seed=4),
    MCTSParams(num_simulations=3, top_k=2, leaf_batch_size=1, max_depth=2, rollout_tokens=2, max_tokens=2, seed=5),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, extra] for extra in range(4)]
MANY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import msgspec
from pagefork import Client, wire
from pagefork.scheduler.search_params import AnyParams
endpoint, jobs = sys.argv[1], json.load(sys.stdin)
decoder = msgspec.json.Decoder(AnyParams)  # made once: threads that make theirs at the same time can crash msgspec
def run(job):
    params = decoder.decode(json.dumps(job["params"]))
    with Client(endpoint) as client:
        found = []
        for prompt in job["prompts"]:
            streamed = {}
            stream = client.stream(prompt, params)
            for delta in stream:
                streamed.setdefault(delta.index, []).extend(delta.tokens)
            output = stream.result()
            assert all(completion.token_ids[:len(streamed.get(completion.index, []))] == streamed.get(completion.index, [])
                       for completion in output.outputs)
            found.append([completion.token_ids for completion in output.outputs])
        return found
with ThreadPoolExecutor(len(jobs)) as pool:
    print(json.dumps(list(pool.map(run, jobs))))
"""


def test_64_clients_at_once_get_what_the_engine_in_process_gives(served: Served, demo: LLM) -> None:
    jobs = [
        {"params": msgspec.to_builtins(STRATEGIES[number % len(STRATEGIES)]), "prompts": [PROMPTS[number // 8 % 4]]}
        for number in range(64)
    ]
    processes = [python(MANY, served.endpoint) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        shares = [jobs[at::4] for at in range(4)]
        said = list(
            pool.map(lambda pair: pair[0].communicate(json.dumps(pair[1]), timeout=60)[0], zip(processes, shares, strict=True))
        )
    prompts = [PROMPTS[number // 8 % 4] for number in range(64)]
    expected = tokens_of(demo, prompts, [STRATEGIES[number % len(STRATEGIES)] for number in range(64)])
    for at, text in enumerate(said):
        assert [answer[0] for answer in json.loads(text)] == expected[at::4]
