"""What the service counts: durations in histograms, ends and refusals by their names."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from pagefork import wire

# Seconds. Those of vLLM, so that dashboards port, and finer ones below for small models.
FIRST_TOKEN = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
]
BETWEEN_TOKENS = [
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
]
END_TO_END = [
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
]


class Histogram:
    """Counts observations by the smallest bound, in seconds, that they don't exceed."""

    def __init__(self, bounds: list[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """The same duration, so many times."""
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def report(self) -> wire.Histogram:
        """As it goes into StatsReply."""
        return wire.Histogram(bounds=self._bounds, counts=self._counts.copy(), sum=self._sum)


class Metrics:
    """Totals since the start."""

    def __init__(self) -> None:
        self.malformed = 0
        self.accepted = 0
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.end_to_end = Histogram(END_TO_END)

    def report(self, sessions: int, requests: int, reserved_tokens: int, step_age: float) -> wire.ServiceStats:
        """These, and the given moment of the service. `step_age`: seconds."""
        return wire.ServiceStats(
            sessions=sessions,
            requests=requests,
            reserved_tokens=reserved_tokens,
            step_age_seconds=step_age,
            malformed_frames=self.malformed,
            accepted=self.accepted,
            finished=dict(self.finished),
            refused=dict(self.refused),
            failed=dict(self.failed),
            time_to_first_token=self.first_token.report(),
            inter_token_latency=self.between_tokens.report(),
            e2e_request_latency=self.end_to_end.report(),
        )
