"""The page of benchmarks/growth.py: a panel for each case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Points = list[dict[str, Any]]
Draws = Callable[[Any, Points], None]


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Panels of the cases that have points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for axes, (name, (title, draw)) in zip(panels.flat, PANELS.items(), strict=True):
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        points = result["cases"].get(name, {}).get("points")
        if not points:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        draw(axes, points)
    figure.suptitle(f"{result['model']}; {result['cpu']}, {result['cores']} cores, {result['date'][:10]}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes: Any, points: Points, x: str, y: str, label: str, scale: float = 1.0) -> None:
    known = [point for point in points if y in point]
    axes.plot([point[x] for point in known], [scale * point[y] for point in known], marker="o", markersize=3.5, label=label)


def _proportional(axes: Any, points: Points, x: str, y: str, scale: float = 1.0) -> None:
    """What would be, were y in proportion to x, from the first point on."""
    first = points[0]
    axes.plot(
        [point[x] for point in points],
        [scale * first[y] * point[x] / first[x] for point in points],
        color="gray",
        linestyle=":",
        label="in proportion",
    )


def _finish(axes: Any, points: Points, x: str, label: str, unit: str) -> None:
    """Logarithmic axes, whose ticks are the points'."""
    values = [point[x] for point in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [_short(value) for value in values], rotation=45 if len(values) > 7 else 0)
    axes.minorticks_off()
    axes.set_yticks(ticks := _round_numbers(*axes.get_ylim()), [_short(tick) for tick in ticks])
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _round_numbers(low: float, high: float) -> list[float]:
    """Up to seven round numbers between the two: the coarsest kind of which there are three, or else the finest."""
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [digit * 10.0**power for power in range(-9, 13) for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found


def _short(value: float) -> str:
    """With a suffix for thousands from ten thousand on, as there is no room for more."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:g}"


def _batch(axes: Any, points: Points) -> None:
    _line(axes, points, "sequences", "tokens_per_s", "decoding")
    _line(axes, points, "sequences", "prompt_tokens_per_s", "prompts of 128 tokens")
    _proportional(axes, points, "sequences", "tokens_per_s")
    _finish(axes, points, "sequences", "sequences in the batch", "tokens/s")


def _context(axes: Any, points: Points) -> None:
    for key in (key for key in points[0] if key.startswith("tokens_per_s_of_")):
        count = key.rpartition("_")[2]
        _line(axes, points, "context", key, "1 sequence" if count == "1" else f"{count} sequences")
    _finish(axes, points, "context", "tokens of context", "tokens/s, decoding")


def _prompt(axes: Any, points: Points) -> None:
    _line(axes, points, "prompt", "seconds", "one prompt", 1000)
    _proportional(axes, points, "prompt", "seconds", 1000)
    _finish(axes, points, "prompt", "tokens of the prompt", "ms to compute it")


def _beam(axes: Any, points: Points) -> None:
    _line(axes, points, "width", "seconds", "one search", 1000)
    _proportional(axes, points, "width", "seconds", 1000)
    _finish(axes, points, "width", "beam width", "ms per step")


def _vocabulary(axes: Any, points: Points) -> None:
    _line(axes, points, "vocabulary", "seconds_top_p", "top_p 0.95", 1000)
    _line(axes, points, "vocabulary", "seconds_greedy", "greedy", 1000)
    _finish(axes, points, "vocabulary", "tokens of the vocabulary", "ms per step of 16 sequences")


def _scheduler(axes: Any, points: Points) -> None:
    _line(axes, points, "sequences", "us_of_samples", "requests of one sequence")
    _line(axes, points, "sequences", "us_of_beams", "searches of 4 beams")
    _proportional(axes, points, "sequences", "us_of_samples")
    _finish(axes, points, "sequences", "sequences", "µs per step, without a model")


def _memory(axes: Any, points: Points) -> None:
    _line(axes, points, "requests", "running_resident", "running: all that the process holds")
    _line(axes, points, "requests", "cache", "of this, keys and values of 136 tokens")
    _line(axes, points, "requests", "running", "running: Python and numpy")
    _line(axes, points, "requests", "waiting", "waiting: Python and numpy")
    _finish(axes, points, "requests", "requests, demo model, 128-token prompts", "bytes per request")


def _startup(axes: Any, points: Points) -> None:
    left = [0.0] * len(points)
    names = [point["model"] for point in points]
    for part in points[0]["parts"]:
        widths = [point["parts"][part] for point in points]
        axes.barh(names, widths, left=left, label=part, height=0.5)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, point, end in zip(names, points, left, strict=True):
        parts = list(point["parts"].values())
        axes.text(end, name, f" {end:.2f} s,\n {sum(parts[2:]):.2f} s of it\n after torch", va="center", fontsize=7)
    axes.set_xlim(right=1.35 * max(left))
    axes.set_ylim(-0.6, len(names) + 0.4)
    axes.set_xlabel("seconds of a fresh process to its first token", fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper left")


PANELS: dict[str, tuple[str, Draws]] = {
    "batch": ("Batch", _batch),
    "context": ("Context", _context),
    "prompt": ("Prompt", _prompt),
    "beam": ("Beam width", _beam),
    "vocabulary": ("Vocabulary, 6 layers", _vocabulary),
    "scheduler": ("Scheduler", _scheduler),
    "memory": ("Memory", _memory),
    "startup": ("Start-up", _startup),
}
