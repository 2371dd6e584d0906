"""What the answers of a load amount to: numbers, lines and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagefork.cli.serving_load import Answer, Run
from pagefork.cli.text import one_line
from pagefork.scheduler.errors import ConfigError

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
_COLUMNS: dict[str, Callable[[list[float]], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}


def values_of(answers: Sequence[Answer], metric: str) -> list[float]:
    """Seconds; an answer has one, several (itl) or none."""
    found: list[float] = []
    for answer in answers:
        value = getattr(answer, metric)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def summary(run: Run, metrics: Sequence[str], points: Sequence[float], goals: Mapping[str, float]) -> dict[str, Any]:
    """The numbers under the names that `vllm bench serve` gives them; metrics without a value are left out.

    Answers that failed, or have not ended, count in `failed` and `unfinished` only. goals: milliseconds.
    """
    good = [answer for answer in run.answers if answer.good]
    failures = [answer.failure for answer in run.answers if answer.failure is not None]
    read, written = sum(answer.prompt_tokens for answer in good), sum(answer.tokens for answer in good)
    found: dict[str, Any] = {
        "duration": run.elapsed,
        "completed": len(good),
        "failed": len(failures),
        "unfinished": len(run.answers) - len(good) - len(failures),
        "failures": dict(Counter(failure.code for failure in failures)),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / run.elapsed,
        "output_throughput": written / run.elapsed,
        "total_token_throughput": (read + written) / run.elapsed,
        "max_concurrent_requests": run.peak,
    }
    if goals:
        found["request_goodput"] = sum(_meets(answer, goals) for answer in good) / run.elapsed
    for metric in metrics:
        if values := values_of(good, metric):
            found |= {f"{name}_{metric}_ms": 1000 * float(column(values)) for name, column in _COLUMNS.items()}
            cuts = np.percentile(values, points).tolist() if points else []
            found |= {f"p{point:g}_{metric}_ms": 1000 * cut for point, cut in zip(points, cuts, strict=True)}
    return found


def details(run: Run) -> dict[str, Any]:
    """What came of every request; times in seconds, those of sending from the first."""
    first = run.answers[0].sent if run.answers else 0.0
    return {
        "input_lens": [answer.prompt_tokens for answer in run.answers],
        "output_lens": [answer.tokens for answer in run.answers],
        "start_times": [answer.sent - first for answer in run.answers],
        "ttfts": [answer.ttft for answer in run.answers],
        "itls": [answer.itl for answer in run.answers],
        "e2els": [None if answer.ended is None else answer.e2el for answer in run.answers],
        "generated_texts": [answer.text for answer in run.answers],
        "errors": ["" if answer.failure is None else str(answer.failure) for answer in run.answers],
    }


def lines(run: Run, found: Mapping[str, Any], metrics: Sequence[str], points: Sequence[float]) -> list[str]:
    """What is printed."""
    totals = (
        "{completed} requests, {total_input_tokens} prompt tokens and {total_output_tokens} output tokens in {duration:.2f} s"
    )
    rates = (
        "{request_throughput:.2f} requests/s, {total_token_throughput:.1f} total tokens/s, "
        "{output_throughput:.1f} output tokens/s"
    )
    told = [totals.format(**found), rates.format(**found)]
    if "request_goodput" in found:
        told.append(f"{found['request_goodput']:.2f} requests/s within the goals of --goodput")
    if found["unfinished"]:
        told.append(f"{found['unfinished']} requests had not ended")
    for code, count in found["failures"].items():
        failure = next(answer.failure for answer in run.answers if answer.failure is not None and answer.failure.code == code)
        told.append(f"{count} requests failed: {one_line(str(failure))}")
    columns = [*_COLUMNS, *(f"p{point:g}" for point in points)]
    for metric in metrics if found["completed"] else ():
        shown = [f"  {name} {found[f'{name}_{metric}_ms']:9.2f}" for name in columns if f"{name}_{metric}_ms" in found]
        told.append(f"{METRICS[metric]:<22} ms{''.join(shown) or '  none'}")
    return told


def draw_plot(run: Run, file: Path, title: str) -> None:
    """Which part of the first tokens, and of the gaps between tokens, came within how many milliseconds."""
    plt = _pyplot()
    good = [answer for answer in run.answers if answer.good]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, metric in zip(panels, ("ttft", "itl"), strict=True):
        values = [1000 * value for value in values_of(good, metric)]
        if values:
            axes.ecdf(values)
            for point, style in ((50, "--"), (99, ":")):
                at = float(np.percentile(values, point))
                axes.axvline(at, linestyle=style, color="grey", label=f"p{point}: {at:.1f}")
            axes.legend(loc="lower right")
        axes.set_xlabel(f"{METRICS[metric]}, ms ({len(values)} values)")
        axes.set_xlim(left=0)
    panels[0].set_ylabel("part of the values")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def check_plot(file: Path) -> None:
    """Raise ConfigError when such a file can't be drawn."""
    endings = _pyplot().Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in endings:
        raise ConfigError(f"plot={str(file)!r}: the name ends with one of {', '.join(sorted(endings))}")


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--plot draws with matplotlib, which is not installed: pip install 'pagefork[bench]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _meets(answer: Answer, goals: Mapping[str, float]) -> bool:
    """A metric without a value meets every goal."""
    return all(1000 * (getattr(answer, metric) or 0.0) <= goal for metric, goal in goals.items())
