"""/metrics is read by Prometheus, and says what the engine says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from support.gateway import Pair

from pagefork import Client
from pagefork.server.launch import Served

# As in the dashboards of vLLM, with its prefix.
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "request_success"),
    *("blocks_copied", "sequences_forked", "forward_tokens", "malformed_frames"),
}
HISTOGRAMS = {"time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"}


def families(pair: Pair) -> dict[str, list[tuple[str, dict[str, str], float]]]:
    answer = pair.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        name = family.name.removeprefix("pagefork:")
        assert name != family.name and family.type in ("gauge", "counter", "histogram") and family.documentation
        found[name] = [(sample.name, sample.labels, sample.value) for sample in family.samples]
        assert all(labels.get("model_name") == "demo" for _, labels, _ in found[name])
    return found


def test_the_names_are_there_with_their_kinds(pair: Pair) -> None:
    pair.complete()
    found = families(pair)
    assert (GAUGES | COUNTERS | HISTOGRAMS | {"live_sequences", "shared_block_ratio", "step_age_seconds"}) <= found.keys()
    for name in COUNTERS:
        assert {sample for sample, _, _ in found[name]} <= {f"pagefork:{name}_total"}
    for name in HISTOGRAMS:
        buckets = [(labels["le"], value) for sample, labels, value in found[name] if sample.endswith("_bucket")]
        values = {sample.rpartition("_")[2]: value for sample, _, value in found[name]}
        assert values.keys() == {"bucket", "count", "sum"} and buckets[-1] == ("+Inf", values["count"])
        assert [float(bound) for bound, _ in buckets] == sorted(float(bound) for bound, _ in buckets)
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)


def test_the_numbers_are_the_engine_s(pair: Pair, served: Served) -> None:
    before = families(pair)
    answer = pair.complete(prompt="import os\nimport sys\n", n=3, max_tokens=5, ignore_eos=True).json()
    after = families(pair)
    with Client(served.endpoint) as client:
        stats = client.stats()

    def value(found: dict[str, list[tuple[str, dict[str, str], float]]], name: str, **labels: str) -> float:
        return sum(value for _, has, value in found[name] if labels.items() <= has.items())

    assert value(after, "generation_tokens") == stats.engine.generated_tokens
    assert value(after, "generation_tokens") - value(before, "generation_tokens") == answer["usage"]["completion_tokens"] == 15
    assert value(after, "forward_tokens") == stats.engine.forward_tokens
    assert value(after, "sequences_forked") - value(before, "sequences_forked") == 2
    lengths = value(after, "request_success", finished_reason="length") - value(
        before, "request_success", finished_reason="length"
    )
    assert lengths == 3
