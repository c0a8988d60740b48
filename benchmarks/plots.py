"""The pictures. ``python -m benchmarks.plots RESULT.json PICTURE.png`` draws one again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks import environment
from benchmarks.registry import CONTENDERS, MODES, OURS

TITLES = {"forward": "Forward", "training": "Forward + backward"}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#e4e4e4",
}


def token_sweep(result: Mapping[str, Any], path: Path) -> None:
    """Draws time against the number of tokens, forward and training side by side.

    Args:
        result: what ``benchmarks.token_sweep`` writes as JSON.
        path: of the PNG.
    """
    settings, header = result["settings"], result["environment"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(12, 5.4), sharey=True, layout="constrained")
        for axes, mode in zip(panels, MODES, strict=True):
            _draw_mode(axes, result, mode)
        panels[0].set_ylabel("time of one call")
        figure.suptitle(
            f"Time against the number of tokens: D = {settings['dim']}, "
            f"batch {settings['batch']}, {settings['dtype']}",
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        commit = f", commit {header['commit'][:9]}" if header["commit"] else ""
        figure.supxlabel(
            f"{environment.machine_line(dict(header))}, {header['date'][:10]}{commit}. "
            "Medians of interleaved runs; exponents fitted over the largest N.",
            fontsize=8.5,
            color="#666666",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def loss_curves(
    result: Mapping[str, Any], lines: Mapping[str, tuple[str, str, str]], path: Path
) -> None:
    """Draws the training loss of each model against the step: mean and range over the seeds.

    Args:
        result: what ``benchmarks.train`` measured, with the losses of every row.
        lines: a row's ``attention`` -> label, color and line style.
        path: of the PNG.
    """
    settings, header = result["settings"], result["environment"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
        for key, (label, color, line) in lines.items():
            losses = np.array([row["losses"] for row in result["rows"] if row["attention"] == key])
            steps = np.arange(losses.shape[1])
            axes.plot(steps, losses.mean(0), line, color=color, lw=1.6, label=label)
            axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.12, lw=0)
        axes.set_yscale("log")
        axes.grid(True, which="major")
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats")
        axes.legend(loc="lower left", frameon=False, fontsize=9.5)
        axes.set_title(f"A ViT on handwritten digits: mean and range of {settings['seeds']} seeds")
        commit = f", commit {header['commit'][:9]}" if header["commit"] else ""
        figure.supxlabel(
            f"{environment.machine_line(dict(header))}, {header['date'][:10]}{commit}",
            fontsize=8.5,
            color="#666666",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _draw_mode(axes: Axes, result: Mapping[str, Any], mode: str) -> None:
    series = _series(result["rows"], mode)
    for name, points in series.items():
        tokens, milliseconds = zip(*points, strict=True)
        exponent = result["exponents"].get(mode, {}).get(name)
        slope = "" if exponent is None else f"   N$^{{{exponent:.2f}}}$"
        if name not in CONTENDERS:
            label = _floor_label(result, mode)
            axes.plot(tokens, milliseconds, ":", color="#333333", lw=1.4, label=label, zorder=1)
            continue
        contender, ours = CONTENDERS[name], name == OURS
        axes.plot(
            tokens,
            milliseconds,
            color=contender.color,
            marker=contender.marker,
            lw=2.8 if ours else 1.8,
            ms=6.5 if ours else 5,
            zorder=4 if ours else 3,
            label=contender.label + slope,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({tokens for points in series.values() for tokens, _ in points})
    axes.set_xticks(every[::2], [f"{tokens:,}" for tokens in every[::2]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_duration))
    axes.grid(True, which="major")
    axes.set_axisbelow(True)
    axes.set_title(TITLES[mode])
    axes.set_xlabel("tokens N")
    axes.legend(loc="upper left", frameon=False, fontsize=9.5)
    _mark_speedup(axes, series)


def _series(rows: Sequence[Mapping[str, Any]], mode: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["mode"] == mode and row["milliseconds"] is not None:
            series.setdefault(row["contender"], []).append((row["tokens"], row["milliseconds"]))
    return series


def _floor_label(result: Mapping[str, Any], mode: str) -> str:
    if result["rates"]:
        return "floor: memory traffic and products at this GPU's rates"
    return f"floor: the layer's {'two' if mode == 'forward' else 'six'} torch.mm alone"


def _mark_speedup(axes: Axes, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """An arrow between the best quadratic contender and ours, at the last N both reached."""
    quadratic = [
        dict(points)
        for name, points in series.items()
        if name in CONTENDERS and CONTENDERS[name].family.exponent == 2
    ]
    ours = dict(series.get(OURS, ()))
    shared = [tokens for tokens in ours if any(tokens in points for points in quadratic)]
    if not shared:
        return
    tokens = max(shared)
    best = min(points[tokens] for points in quadratic if tokens in points)
    arrow = {"arrowstyle": "<->", "color": "#444444", "lw": 1.1, "shrinkA": 5, "shrinkB": 6}
    axes.annotate("", (tokens, best), (tokens, ours[tokens]), arrowprops=arrow, zorder=2)
    axes.annotate(
        f"{best / ours[tokens]:,.0f}x",
        (tokens, best**0.65 * ours[tokens] ** 0.35),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        color="#444444",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        zorder=5,
    )


def _duration(milliseconds: float, _: object) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:g} s"
    return f"{milliseconds:g} ms" if milliseconds >= 1 else f"{milliseconds * 1000:g} µs"


def gpu_table(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Draws a table of :mod:`benchmarks.gpu_tables` that has a picture: ``floor`` as bars, times
    against the number of tokens for ``attention``; nothing for the others."""
    rows = [row for row in result["rows"] if row["status"] == "timed"]
    draw = {"floor": _draw_floor, "attention": _draw_attention}.get(name)
    if draw is None or not rows:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
        draw(axes, rows)
        header = result["environment"]
        caption = f"{environment.machine_line(dict(header))}, {header['date'][:10]}. Medians."
        figure.supxlabel(caption, fontsize=8.5, color="#666666", x=0.01, ha="left")
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _draw_floor(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [f"{row['slices']:,} x {row['tokens']:,} x {row['dim']}" for row in rows]
    colors = ["#009E73" if row["path"] == "short" else "#56B4E9" for row in rows]
    axes.barh(names, [row["times floor"] for row in rows], color=colors)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#333333", lw=1.4, ls=":")
    axes.axvline(rows[0]["target"], color="#D55E00", lw=1.4, ls="--")
    axes.set_xlabel("time of a forward pass / floor (dotted: 1, dashed: target)")
    axes.set_title("slices x tokens x D")


def _draw_attention(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for key in ("sdpa_block", OURS):
        for alone, style in ((True, "-"), (False, "--")):
            points = sorted(
                (row["tokens"], row[f"{key} us"] / row["batch"])
                for row in rows
                if (row["batch"] == 1) == alone
            )
            if not points:
                continue
            contender, label = CONTENDERS[key], "batch 1" if alone else "large batch, an image"
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=contender.color,
                marker=contender.marker,
                label=f"{contender.label}, {label}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens N")
    axes.set_ylabel("microseconds of a forward pass")
    axes.set_title(f"D = {rows[0]['dim']}, {rows[0]['heads']} heads")
    axes.grid(True, which="major")
    axes.legend(frameon=False, fontsize=9.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("result", type=Path, help="token_sweep.json")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    token_sweep(json.loads(options.result.read_text()), options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
