"""What the runs of compare.py say: medians, ratios, shares of the limit; as a table and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def summarise(engines: Mapping[str, Row], loads: Mapping[str, Row], runs: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each load and engine: rate (median, lowest, highest, rounds), share of the limit and `ahead`.

    `ahead` is by how much ours with weights of the same kind is faster: the median over the rounds that both ran. An
    engine without a time has `error` or `unsupported` instead. Each load also has `best_peers`: for whole weights
    and for 8 bits the peer with the highest median, and how far ahead of it ours is.
    """
    summary: dict[str, dict[str, Any]] = {}
    for load, facts in loads.items():
        rates = {
            engine: {run["round"]: run["tokens"] / run["seconds"] for run in _of(runs, load, engine) if "seconds" in run}
            for engine in engines
        }
        rows = {engine: _row(engines, rates, engine, facts, _of(runs, load, engine)) for engine in engines}
        best = {}
        for kind, quantised in (("whole", False), ("8 bits", True)):
            peers = [
                name for name in engines if rates[name] and not engines[name]["ours"] and _quantised(engines[name]) == quantised
            ]
            if peers:
                name = max(peers, key=lambda peer: rows[peer]["median"])
                best[kind] = {"engine": name, "ahead": rows[name].get("ahead")}
        summary[load] = {"engines": rows, "best_peers": best}
    return summary


def _of(runs: Sequence[Row], load: str, engine: str) -> list[Row]:
    return [run for run in runs if run["load"] == load and run["engine"] == engine]


def _quantised(engine: Row) -> bool:
    return bool(engine["bits"] < 16)


def _row(
    engines: Mapping[str, Row], rates: Mapping[str, Mapping[int, float]], name: str, load: Row, runs: Sequence[Row]
) -> dict[str, Any]:
    if not rates[name]:
        for reason in ("unsupported", "error"):
            for told in (engines[name], *runs):
                if reason in told:
                    return {reason: told[reason]}
        return {"error": "not run"}
    values, quantised = list(rates[name].values()), _quantised(engines[name])
    median = statistics.median(values)
    row = {
        "median": median,
        "lowest": min(values),
        "highest": max(values),
        "rounds": len(values),
        "share_of_limit": median / load["limit_8_bits" if quantised else "limit"],
    }
    for ours, engine in engines.items():
        if engine["ours"] and ours != name and _quantised(engine) == quantised:
            ratios = [rates[ours][turn] / rate for turn, rate in rates[name].items() if turn in rates[ours]]
            if ratios:
                row["ahead"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return row


def title(load: Row) -> str:
    return (f"beam {load['beam']}: " if load["beam"] else "") + f"{load['prompts']} x ({load['input']} + {load['output']})"


def table(result: Row) -> str:
    """Markdown: a row for each engine, a column for each load, the limits, the ratios, and what failed and why."""
    loads, summary = result["loads"], result["summary"]
    lines = ["| engine | " + " | ".join(title(load) for load in loads.values()) + " |", "|---" * (len(loads) + 1) + "|"]
    for quantised in (False, True):
        names = [name for name, engine in result["engines"].items() if _quantised(engine) == quantised]
        for name in names:
            mark = "**" if result["engines"][name]["ours"] else ""
            cells = [_cell(summary[load]["engines"][name], mark) for load in loads]
            lines.append(f"| {mark}{name}{mark} | " + " | ".join(cells) + " |")
        if names:
            ours = next((name for name in names if result["engines"][name]["ours"]), None)
            field, kind = ("limit_8_bits", "8 bits") if quantised else ("limit", "whole")
            best = [summary[load]["best_peers"].get(kind) for load in loads]
            cells = [f"{one['ahead']['median']:.2f}x" if one and one["ahead"] else "" for one in best]
            lines.append(f"| ahead of the best peer{', 8 bits' if quantised else ''} | " + " | ".join(cells) + " |")
            cells = [f"{facts[field]:.0f}" + _share(summary[load]["engines"].get(ours, {})) for load, facts in loads.items()]
            lines.append(f"| limit of the machine{', 8 bits' if quantised else ''} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(result)]) + "\n"


def _cell(row: Row, mark: str) -> str:
    """Tokens per second, and by how much ours is faster."""
    if "median" not in row:
        return "-" if "unsupported" in row else "failed"
    ahead = f" ({row['ahead']['median']:.2f}x)" if "ahead" in row else ""
    return f"{mark}{row['median']:.0f}{mark}{ahead}"


def _share(row: Row) -> str:
    """How much of the limit ours reaches."""
    return f" (reached: {row['share_of_limit']:.0%})" if "median" in row else ""


def _notes(result: Row) -> list[str]:
    versions: dict[str, str] = {}
    for engine in result["engines"].values():
        versions |= engine.get("versions", {})
    rounds = max((run["round"] for run in result["runs"]), default=-1) + 1
    how = (
        "Output tokens per second, prefill included; in brackets by how much Pagefork with weights of the same kind is faster. "
        f"Median of up to {rounds} rounds in turn on {result['threads']} cores ({result['cpu']}), {result['date'][:10]}. "
        f"Memory is read at {result['read_gb_per_s']:.1f} GB/s and bfloat16 multiplied at "
        f"{result['product_gflop_per_s']:.0f} GFLOP/s. Model: {result['model']}."
    )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [how, "", f"Versions: {listed}.", ""]
    for name, engine in result["engines"].items():
        if "error" in engine:
            lines.append(f"- {name} failed: {engine['error']}")
            continue
        lines.append(f"- {name}: {engine['settings']}.")
        for load, found in result["summary"].items():
            if "error" in found["engines"][name]:
                lines.append(f"  - {load} failed: {found['engines'][name]['error']}")
    return lines


def draw_chart(result: Row, path: Path) -> None:
    """A panel for each load, a bar for each engine, a line at the limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(reversed(result["engines"]))
    loads = result["loads"]
    figure, panels = plt.subplots(
        1, len(loads), figsize=(1.6 + 2.9 * len(loads), 1.1 + 0.3 * len(names)), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (load, facts) in zip(panels[0], loads.items(), strict=True):
        rows = [result["summary"][load]["engines"][name] for name in names]
        colours = [_colour(result["engines"][name]) for name in names]
        values = [row.get("median", 0.0) for row in rows]
        bars = axes.barh(range(len(names)), values, color=colours)
        axes.bar_label(bars, [_label(row) for row in rows], fontsize=8, padding=2)
        for place, (name, row) in enumerate(zip(names, rows, strict=True)):
            if "median" in row:
                axes.plot([row["lowest"], row["highest"]], [place, place], color="black", linewidth=1)
            limit = facts["limit_8_bits" if _quantised(result["engines"][name]) else "limit"]
            axes.plot([limit, limit], [place - 0.5, place + 0.5], color="tab:red", linewidth=1.5)
        axes.set_title(title(facts), fontsize=10)
        axes.set_xlabel("output tokens/s")
        axes.set_xlim(0, 1.18 * max([facts["limit"], facts["limit_8_bits"], *values]))
        axes.set_yticks(range(len(names)), names, fontsize=9)
    figure.suptitle("red: what the memory and the arithmetic of the machine allow; black: lowest to highest", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colour(engine: Row) -> str:
    if engine["ours"]:
        return "tab:blue"
    return "tab:olive" if _quantised(engine) else "tab:gray"


def _label(row: Row) -> str:
    if "median" in row:
        return f"{row['median']:.0f}"
    return "none" if "unsupported" in row else "failed"
