"""The chart of the engine on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One bar for each row, in a panel for each unit, with a mark where the device's limit is.

    Nothing without matplotlib or rows.
    """
    rows = [row for row in rows if "error" not in row]
    try:
        import matplotlib as mpl
    except ImportError:
        return
    if not rows:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    units = list(dict.fromkeys(row["unit"] for row in rows))
    height = 1.2 + 0.26 * max(sum(row["unit"] == unit for row in rows) for unit in units)
    figure, panels = plt.subplots(1, len(units), figsize=(7.5 * len(units), height), layout="constrained", squeeze=False)
    for axes, unit in zip(panels[0], units, strict=True):
        shown = sorted((row for row in rows if row["unit"] == unit), key=lambda row: (row["model"], row["case"]), reverse=True)
        places = range(len(shown))
        colours = ["tab:orange" if row["how"].startswith("transformers") else "tab:blue" for row in shown]
        bars = axes.barh(places, [row["value"] for row in shown], color=colours)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        limits = [(row["limit"], place) for row, place in zip(shown, places, strict=True) if row["limit"]]
        if limits:
            axes.plot(*zip(*limits, strict=True), "k|", markersize=9, label="limit of the device")
            axes.legend(fontsize=7)
        axes.set_yticks(places, [f"{row['model']}: {row['case']}, {row['how']}" for row in shown], fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
    figure.savefig(path, dpi=120)
    plt.close(figure)
