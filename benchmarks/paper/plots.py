"""The pictures of the report. Each takes what ``benchmarks.paper`` writes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import report
from benchmarks.paper import latency, units_over_tokens
from benchmarks.plots import STYLE, plt

COLORS = {
    "multi_head": "#D55E00",
    "linformer": "#0072B2",
    "literal": "#56B4E9",
    "sep_attn": "#009E73",
    "v2": "#999999",
    "v2_patched": "#004D38",
}


def tokens(result: Mapping[str, Any], path: Path) -> None:
    """Time of one layer against k, and the share of its time in its slowest operators."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
        _draw_lines(panels[0], result["figure"])
        _draw_operators(panels[1], result["profiles"])
        _finish(figure, result, path, "One attention layer: d = 512, 8 heads, one thread, float32")


def _draw_lines(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    for unit in units_over_tokens.UNITS:
        points = [(row["tokens"], row["milliseconds"]) for row in rows if row["unit"] == unit.key]
        ours = unit.key == "sep_attn"
        axes.plot(
            *zip(*points, strict=True),
            color=unit.color,
            marker=unit.marker,
            lw=2.8 if ours else 1.8,
            zorder=4 if ours else 3,
            label=unit.label,
        )
    every = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(every, [f"{k:,}" for k in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major")
    axes.set_title("Time against the number of tokens")
    axes.set_xlabel("tokens k")
    axes.set_ylabel("ms a call")
    axes.legend(loc="upper left", frameon=False, fontsize=9.5)


def _draw_operators(axes: Axes, profiles: list[Mapping[str, Any]]) -> None:
    labels = {unit.key: unit.label for unit in units_over_tokens.UNITS}
    shades = ("#1b4965", "#5fa8d3", "#f4a259", "#bc4b51", "#8cb369")
    for row, profile in enumerate(profiles):
        left = 0.0
        for shade, operator in zip(shades, profile["top"], strict=False):
            width = operator["microseconds"] / 1e3
            axes.barh(row, width, left=left, color=shade, height=0.5)
            left += width
        names = [operator["operator"].rpartition("::")[2] for operator in profile["top"][:3]]
        axes.text(0, row - 0.32, f"{labels[profile['unit']]}: {', '.join(names)}", fontsize=8)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_title(
        f"The {units_over_tokens.TOP_OPERATORS} slowest operators at k = {profiles[0]['tokens']}"
    )
    axes.set_xlabel("ms a call, under the profiler; the largest three are named")


def latencies(result: Mapping[str, Any], path: Path) -> None:
    """Whole models and attention layers, one panel for each part and number of images."""
    rows = [row for row in result["latency"] if row["milliseconds"] is not None]
    groups = dict(report.grouped(rows, "part", "batch", "threads"))
    columns, size = max(1, len(groups) // len(latency.PARTS)), result["image_size"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            -(-len(groups) // columns),
            columns,
            figsize=(max(8.0, 3.6 * columns + 2.4), 6.6),
            layout="constrained",
            squeeze=False,
        )
        ordered = sorted(groups.items(), key=lambda item: item[0][0], reverse=True)
        for axes, ((part, batch, threads), members) in zip(panels.flat, ordered, strict=False):
            _draw_bars(axes, members)
            axes.set_title(
                f"{latency.PARTS[part]}, batch {batch}, {report.threads(threads)}", fontsize=10
            )
        for row in panels:
            for axes in row[1:]:
                axes.set_yticklabels([])
        for axes in panels.flat[len(groups) :]:  # as long as not all is measured
            axes.set_axis_off()
        _finish(figure, result, path, f"MobileViT at {size} x {size}, each attention unit, float32")


def _draw_bars(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    labels = {contender.key: contender.label for contender in latency.CONTENDERS}
    keys = list(labels)
    for row in rows:
        compiled = row["mode"] == "compiled"
        axes.barh(
            keys.index(row["contender"]) + (0.2 if compiled else -0.2),
            row["milliseconds"],
            height=0.36,
            color=COLORS[row["contender"]],
            alpha=0.5 if compiled else 1.0,
        )
    axes.set_yticks(range(len(keys)), list(labels.values()), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms a call; pale: torch.compile")


def _finish(figure: Figure, result: Mapping[str, Any], path: Path, title: str) -> None:
    header = result["environment"]
    commit = f", commit {header['commit'][:9]}" if header["commit"] else ""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{header['cpu']}, torch {header['torch']}, {header['date'][:10]}{commit}. "
        "Medians of interleaved runs.",
        fontsize=8.5,
        color="#666666",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
