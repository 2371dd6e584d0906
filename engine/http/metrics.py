"""A StatsReply as Prometheus has it. The names are those of vLLM, so that dashboards work after a change of the prefix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pagefork.wire import Histogram, StatsReply

PREFIX = "pagefork:"


class StatsCollector(Collector):
    """The metrics of one reply. Every one has the label model_name."""

    def __init__(self, stats: StatsReply, model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterable[Metric]:
        """For a registry."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        engine, service = self._stats.engine, self._stats.service
        for name, meaning, value in (
            ("num_requests_running", "Requests that run", engine.num_running),
            ("num_requests_waiting", "Requests that wait", engine.num_waiting),
            (
                "kv_cache_usage_perc",
                "Part of the cache blocks that are in use; 1 is all",
                1 - engine.free_blocks / engine.num_blocks,
            ),
            ("live_sequences", "Sequences that hold blocks, of all requests", engine.live_sequences),
            ("cached_blocks", "Blocks in the prefix cache", engine.cached_blocks),
            ("shared_block_ratio", "Part of the blocks that is saved because sequences share", engine.shared_block_ratio),
            ("sessions", "Clients of the service", service.sessions),
            ("reserved_tokens", "Prompt tokens that are reserved", service.reserved_tokens),
            ("step_age_seconds", "Since a step ended, while there is work", service.step_age_seconds),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        engine, service = self._stats.engine, self._stats.service
        for name, meaning, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", engine.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", engine.prefix_hits),
            ("num_preemptions", "Requests that lost their blocks and began again", engine.preemptions),
            ("prompt_tokens", "Prompt tokens of accepted requests", engine.prompt_tokens),
            ("generation_tokens", "Tokens generated", engine.generated_tokens),
            ("forward_tokens", "Tokens computed, recomputed ones too", engine.forward_tokens),
            ("sequences_forked", "Sequences that began as copies of others", engine.forks),
            ("blocks_copied", "Blocks copied on write", engine.blocks_copied),
            ("steps", "Steps of the engine", engine.steps),
            ("requests_accepted", "Requests accepted", service.accepted),
            ("malformed_frames", "Messages that could not be read", service.malformed_frames),
        ):
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        for name, meaning, label, table in (
            ("request_success", "Outputs that ended, by reason", "finished_reason", service.finished),
            ("requests_refused", "Requests refused, by code", "code", service.refused),
            ("requests_failed", "Requests that failed, by code", "code", service.failed),
        ):
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=["model_name", label])
            for key, value in sorted(table.items()):
                counter.add_metric([self._model, key], value)
            yield counter

    def _histograms(self) -> Iterator[Metric]:
        service = self._stats.service
        for name, meaning, found in (
            ("time_to_first_token_seconds", "From the arrival of a request", service.time_to_first_token),
            ("inter_token_latency_seconds", "Between tokens of an output", service.inter_token_latency),
            ("e2e_request_latency_seconds", "From the arrival of a request to its end", service.e2e_request_latency),
        ):
            histogram = HistogramMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            histogram.add_metric([self._model], _buckets(found), found.sum)
            yield histogram


def render(stats: StatsReply, model: str) -> bytes:
    """The page of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatsCollector(stats, model))
    return generate_latest(registry)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, itertools.accumulate(histogram.counts)), strict=True))
