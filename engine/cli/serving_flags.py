"""The settings of `bench serve`, named as in `vllm bench serve`."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from pagefork.cli.throughput import Count
from pagefork.scheduler.checking import Checked
from pagefork.scheduler.errors import ParameterError

_METRICS = ("ttft", "tpot", "itl", "e2el")
_GOALS = ("ttft", "tpot", "e2el")


class ServeLoad(Checked, frozen=True, kw_only=True):
    """What `bench serve` runs, and where."""

    backend: Annotated[
        Literal["zmq", "openai"], Meta(description="zmq: an engine of `pagefork serve`; openai: a server of /v1/completions")
    ] = "zmq"
    address: Annotated[str, Meta(description="Of the engine: its name, ipc://... or tcp://...")] = "default"
    server_key: Annotated[str, Meta(description="File with the engine's public key, where it wants CURVE")] | None = None
    client_key: Annotated[str, Meta(description="File with this client's secret key, of `pagefork keys new`")] | None = None
    base_url: Annotated[str, Meta(description="Of the HTTP server, instead of host and port")] | None = None
    host: Annotated[str, Meta(description="Of the HTTP server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="Of the HTTP server")] = 8000
    endpoint: Annotated[str, Meta(description="Path at the HTTP server")] = "/v1/completions"
    model: Annotated[str, Meta(description="What the service has to run; none: what it runs")] | None = None
    extra_body: Annotated[str, Meta(description="JSON object with further fields of every HTTP request")] | None = None

    dataset_name: Annotated[
        Literal["random", "custom"],
        Meta(description="random: token ids, over HTTP those below 1000; custom: the lines of --dataset-path"),
    ] = "random"
    dataset_path: (
        Annotated[str, Meta(description='JSON objects, one a line: "prompt" or "prompt_token_ids", and perhaps "max_tokens"')]
        | None
    ) = None
    num_prompts: Annotated[Count, Meta(description="Requests; none: 64 random ones, or every line of the file")] | None = None
    random_input_len: Annotated[Count, Meta(description="Tokens of a random prompt")] = 128
    random_output_len: Annotated[Count, Meta(description="Tokens of a random prompt's output")] = 64
    random_prefix_len: Annotated[int, Meta(ge=0, description="Tokens before them that all random prompts share")] = 0
    random_range_ratio: Annotated[
        float, Meta(ge=0, lt=1, description="Both lengths are drawn from length * (1 - this) to length * (1 + this)")
    ] = 0.0
    custom_output_len: Annotated[Count, Meta(description='Tokens of an output, where its line has no "max_tokens"')] = 64
    seed: Annotated[int, Meta(ge=0, description="Of the random prompts and of the times of arrival")] = 0

    request_rate: Annotated[float, Meta(gt=0, description="Requests per second; inf: all at once")] | None = None
    burstiness: Annotated[
        float,
        Meta(gt=0, description="Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts"),
    ] = 1.0
    max_concurrency: Annotated[Count, Meta(description="Requests at once; others wait here, unmeasured")] | None = None
    num_warmups: Annotated[int, Meta(ge=0, description="Requests before those that count")] = 0
    ready_check_timeout_sec: Annotated[int, Meta(ge=0, description="Seconds to wait for the service to be there")] = 0

    percentile_metrics: Annotated[str, Meta(description="What is reported, of ttft, tpot, itl and e2el")] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, Meta(description="Percentiles that are reported, as 25,50,99.9")] = "90,99"
    goodput: Annotated[
        list[str],
        Meta(description='Milliseconds that count as good, as "ttft:200 tpot:50 e2el:5000": requests per second within all'),
    ] = msgspec.field(default_factory=list)
    disable_tqdm: Annotated[bool, Meta(description="Show no progress bar")] = False
    save_result: Annotated[bool, Meta(description="Write the numbers to a JSON file")] = False
    save_detailed: Annotated[bool, Meta(description="And those of every request, with the texts")] = False
    result_dir: Annotated[str, Meta(description="Folder of that file")] | None = None
    result_filename: Annotated[str, Meta(description="Its name; none: one of backend, rate, model and time")] | None = None
    metadata: Annotated[list[str], Meta(description="KEY=VALUE to write to that file")] = msgspec.field(default_factory=list)

    error: ClassVar = ParameterError
    foreign: ClassVar[dict[str, str]] = {}
    noun: ClassVar[str] = "parameter"

    def __post_init__(self) -> None:
        if self.request_rate == float("inf"):
            msgspec.structs.force_setattr(self, "request_rate", None)
        self.check_fields()
        for name, value, owned in _OWNED:
            given = getattr(self, name)
            idle = [other for other in owned if given != value and getattr(self, other) != _DEFAULTS[other]]
            if idle:
                raise ParameterError(f"{idle[0]} is for {name}={value}, and {name} is {given}")
        if self.request_rate is None and self.burstiness != 1:
            raise ParameterError(f"burstiness={self.burstiness} is for a finite request_rate, which is not given")
        if self.dataset_name == "custom" and self.dataset_path is None:
            raise ParameterError("dataset_name=custom takes its prompts from dataset_path, which is not given")
        if self.base_url is not None and (self.host, self.port) != ("127.0.0.1", 8000):
            raise ParameterError("base_url stands for host and port: leave out one or the other")
        for read in (self.metrics, self.percentiles, self.goals, self.notes, self.further):
            read()

    def metrics(self) -> list[str]:
        """The metrics that are reported."""
        names = _split(self.percentile_metrics)
        if unknown := [name for name in names if name not in _METRICS]:
            raise ParameterError(f"percentile_metrics has {unknown[0]!r}; there are {', '.join(_METRICS)}")
        return names

    def percentiles(self) -> list[float]:
        """From 0 to 100."""
        try:
            points = [float(text) for text in _split(self.metric_percentiles)]
        except ValueError:
            points = [-1.0]
        if not all(0 <= point <= 100 for point in points):
            raise ParameterError(
                f"metric_percentiles={self.metric_percentiles!r} must be numbers from 0 to 100 with commas between"
            )
        return points

    def goals(self) -> dict[str, float]:
        """Milliseconds by metric."""
        found = {}
        for pair in _split(" ".join(self.goodput)):
            name, _, number = pair.partition(":")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = -1.0
            if name not in _GOALS or not 0 <= found[name] < float("inf"):
                raise ParameterError(f"goodput has {pair!r}; it takes NAME:MILLISECONDS, and the names are {', '.join(_GOALS)}")
        return found

    def notes(self) -> dict[str, str]:
        """The metadata."""
        for pair in self.metadata:
            if "=" not in pair:
                raise ParameterError(f"metadata has {pair!r}, which is not KEY=VALUE")
        return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in self.metadata)}

    def further(self) -> dict[str, Any]:
        """The fields of extra_body."""
        try:
            found = json.loads(self.extra_body or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ParameterError(f"extra_body={self.extra_body!r:.80} is no JSON object")
        return found


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(ServeLoad)} | {"goodput": [], "metadata": []}
# A setting, and those that do nothing unless it has this value.
_OWNED: list[tuple[str, Any, list[str]]] = [
    ("backend", "zmq", ["address", "server_key", "client_key"]),
    ("backend", "openai", ["base_url", "host", "port", "endpoint", "extra_body"]),
    ("dataset_name", "random", ["random_input_len", "random_output_len", "random_prefix_len", "random_range_ratio"]),
    ("dataset_name", "custom", ["dataset_path", "custom_output_len"]),
    ("save_result", True, ["save_detailed", "result_dir", "result_filename", "metadata"]),
]


def _split(text: str) -> list[str]:
    """The parts between commas or white space."""
    return text.replace(",", " ").split()
