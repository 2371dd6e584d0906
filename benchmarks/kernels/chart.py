"""The chart of the kernels' times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """For every operation, microseconds of each case against its floor, and the peers'. Nothing without matplotlib or cases."""
    results = [result for result in results if result["cases"]]
    try:
        import matplotlib as mpl
    except ImportError:
        return
    if not results:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.6 * len(results), 4), layout="constrained", squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        floors = [case["floor_us"] for case in result["cases"]]
        for name in sorted({name for case in result["cases"] for name in case["peers"]}):
            points = [(case["floor_us"], case["peers"][name]["us"]) for case in result["cases"] if name in case["peers"]]
            axes.loglog(*zip(*points, strict=True), ".", alpha=0.5, label=name)
        axes.loglog(floors, [case["us"] for case in result["cases"]], "k.", label="Pagefork")
        axes.loglog([min(floors), max(floors)], [min(floors), max(floors)], ":", color="grey", label="floor")
        axes.set_title(f"{result['op']}, {result['gpu']}", fontsize=9)
        axes.set_xlabel("µs to move the bytes")
        axes.set_ylabel("µs")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
