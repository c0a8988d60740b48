"""The pictures of the report. Each takes what ``benchmarks.cpu`` writes as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import report
from benchmarks.cpu.scaling import exponents, label
from benchmarks.cpu.table import TITLES
from benchmarks.cpu.workload import FLOOR, LAYOUTS, TIMM
from benchmarks.plots import STYLE, plt

COLORS = {
    TIMM: "#999999",
    FLOOR: "#333333",
    "sep_attn": "#009E73",
    "sep_attn_patches": "#0072B2",
    "sep_attn_image": "#D55E00",
}
MARKERS = {TIMM: "P", FLOOR: "|", "sep_attn": "o", "sep_attn_patches": "s", "sep_attn_image": "^"}
Row = Mapping[str, Any]
DTYPE = "float32"  # all that is drawn


def roofline(result: Mapping[str, Any], path: Path) -> None:
    """Operations a second of each float32 shape against the multiply-add units' peak; beside each
    line the share of it that the best layout reaches.

    Operations are those of the two or six products for every layer, so that timm's module, which
    does more, is not credited for them.
    """
    rows = [row for row in result["rows"] if row["dtype"] == DTYPE and row["gflops"] is not None]
    groups = dict(report.grouped(rows, "mode", "threads"))
    modes = list(dict.fromkeys(mode for mode, _ in groups))
    counts = list(dict.fromkeys(threads for _, threads in groups))
    peaks = {int(count): peak * 1e-9 for count, peak in result["fma_peaks"].items()}
    shapes = len(dict(report.grouped(rows, "slices", "tokens", "dim")))
    title = "Share of the multiply-add units' peak, float32\n"
    size = (1.5 + 5.5 * len(counts), 1.7 + (1.2 + 0.32 * shapes) * len(modes))
    with _figure(result, path, len(modes), len(counts), size, title) as panels:
        for axes, (mode, threads) in zip(
            panels, [(mode, count) for mode in modes for count in counts], strict=True
        ):
            _draw_roofline(axes, groups[mode, threads], peaks.get(threads))
            axes.set_title(f"{TITLES[mode]}, {report.threads(threads)}")
        # Below the title, which leaves a line free.
        handles, labels = panels[0].get_legend_handles_labels()
        top = (0.005, 1 - 0.26 / size[1])
        where = {"loc": "upper left", "bbox_to_anchor": top, "ncols": len(labels)}
        panels[0].figure.legend(handles, labels, **where, frameon=False, fontsize=9)


def _draw_roofline(axes: Axes, rows: Sequence[Row], peak: float | None) -> None:
    shapes = [shape for shape, _ in report.grouped(rows, "slices", "tokens", "dim")]
    for name in (TIMM, FLOOR, *LAYOUTS):
        points = [
            (row["gflops"], shapes.index((row["slices"], row["tokens"], row["dim"])))
            for row in rows
            if row["contender"] == name
        ]
        if points:
            gflops, heights = zip(*points, strict=True)
            weight = {"ms": 13, "mew": 2.4} if name == FLOOR else {"ms": 6}
            style = {"color": COLORS[name], "marker": MARKERS[name], **weight}
            text = "torch.mm alone" if name == FLOOR else label(name)
            axes.plot(gflops, heights, ls="none", label=text, alpha=0.9, **style)
    right = max([peak or 0, *(row["gflops"] for row in rows)])
    if peak is not None:
        axes.axvline(peak, color="#CC0000", lw=1.6, label="fused multiply-adds alone")
        for height, shape in enumerate(shapes):
            best = [
                row["gflops"]
                for row in rows
                if (row["slices"], row["tokens"], row["dim"]) == shape
                and row["contender"] in LAYOUTS
            ]
            if best:
                share = f"{max(best) / peak:.0%}"
                axes.text(right * 1.02, height, share, va="center", fontsize=9, color="#444444")
    axes.set_xlim(0, right * 1.12)
    axes.set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s")
    axes.set_ylabel("slices, N, D")
    axes.grid(True, axis="both")
    axes.set_axisbelow(True)


def thread_scaling(result: Mapping[str, Any], path: Path) -> None:
    """Speed-up over one thread, a panel for each shape."""
    groups = list(report.grouped(result["thread_rows"], "slices", "tokens", "dim"))
    size = (1 + 3.9 * len(groups), 4.6)
    with _figure(
        result, path, 1, len(groups), size, "Speed-up by threads, forward, float32"
    ) as panels:
        for axes, ((slices, tokens, dim), rows) in zip(panels, groups, strict=True):
            counts = sorted({row["threads"] for row in rows})
            axes.plot(counts, np.array(counts) / counts[0], ":", color="#bbbbbb", label="ideal")
            for (name,), series in report.grouped(rows, "contender"):
                _line(axes, name, counts, [row["speedup"] for row in series], label(name))
            axes.set_title(f"{slices}, {tokens}, {dim}")
            axes.set_xticks(counts)
            axes.set_xlabel("threads")
            axes.grid(True)
        panels[0].set_ylabel(f"times as fast as on {report.threads(counts[0])}")
        panels[0].legend(loc="upper left", frameon=False, fontsize=8.5)


def token_scaling(result: Mapping[str, Any], path: Path) -> None:
    """Time of one token against the number of tokens: a level line is an exponent of one."""
    rows = result["token_rows"]
    groups = list(report.grouped(rows, "threads"))
    slopes = {(fit["threads"], fit["contender"]): fit["exponent"] for fit in exponents(rows)}
    title = f"Time of one token, forward, D = {rows[0]['dim']}, float32"
    with _figure(result, path, 1, len(groups), (1 + 5.5 * len(groups), 4.8), title) as panels:
        for axes, ((threads,), group) in zip(panels, groups, strict=True):
            for (name,), series in report.grouped(group, "contender"):
                tokens = [row["tokens"] for row in series]
                nanoseconds = [row["milliseconds"] * 1e6 / row["tokens"] for row in series]
                slope = slopes[threads, name]
                power = "" if slope is None else f"   N$^{{{slope:.3f}}}$"
                _line(axes, name, tokens, nanoseconds, label(name) + power)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xticks(tokens[::2], [f"{count:,}" for count in tokens[::2]])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="x", labelsize=8.5)
            axes.set_title(report.threads(threads))
            axes.set_xlabel("tokens N")
            axes.grid(True)
            axes.legend(loc="lower left", frameon=False, fontsize=9)
        panels[0].set_ylabel("nanoseconds a token")


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], text: str) -> None:
    marker = "." if name == FLOOR else MARKERS[name]
    style = ":" if name == FLOOR else "-"
    axes.plot(x, y, style, color=COLORS[name], marker=marker, ms=5, lw=1.8, label=text)


@contextmanager
def _figure(
    result: Mapping[str, Any],
    path: Path,
    rows: int,
    columns: int,
    size: tuple[float, float],
    title: str,
) -> Iterator[list[Axes]]:
    """A titled grid of panels, left to right and top to bottom, written when the block ends."""
    header = result["environment"]
    with plt.rc_context(STYLE):
        figure: Figure
        figure, panels = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        yield list(panels.flat)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        commit = f", commit {header['commit'][:9]}" if header["commit"] else ""
        caption = f"{header['cpu']}, {header['cores']} cores, torch {header['torch']}, "
        caption += f"{header['date'][:10]}{commit}. Medians of interleaved turns."
        figure.supxlabel(caption, fontsize=8.5, color="#666666", x=0.01, ha="left")
        figure.savefig(path, dpi=160)
        plt.close(figure)
