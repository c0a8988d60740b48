"""The report in Markdown: each measured figure beside the paper's, and what to make of it.

Every sentence that judges a figure is chosen by that figure, so that another machine's report
says what was found there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.paper import latency, units_over_tokens

Row = Mapping[str, Any]
PHONE = {c.key: c.paper_ms for c in latency.CONTENDERS if c.paper_ms is not None}
LABELS = {contender.key: contender.label for contender in latency.CONTENDERS}


def document(result: Mapping[str, Any]) -> str:
    """The whole report, from what ``benchmarks.paper`` writes as JSON."""
    parts = [_head(result)]
    for key, section in (
        ("sizes", _sizes),
        ("latency", _latency),
        ("figure", _figure),
        ("features", _features),
    ):
        if result.get(key):
            parts += section(result)
    parts += _sources()
    return "\n\n".join(parts) + "\n"


def _head(result: Mapping[str, Any]) -> str:
    header = result["environment"]
    commit = header["commit"] or "unknown"
    return f"""# The paper's tables on this machine

Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers" (2022),
[arXiv 2206.02680](https://arxiv.org/abs/2206.02680). Written by `make paper`.

{header["cpu"]}, {header["cores"]} cores, instruction set `{header["cpu_capability"]}`,
torch {header["torch"]}, timm {header["timm"]}, transformers {header["transformers"]},
linformer {header["linformer"]}, {header["date"][:10]}, commit {commit[:9]}\
{" with uncommitted changes" if header["dirty"] else ""}.
All weights are random, from a fixed seed: accuracy is not measured. Everything was held against
float64 before it was timed. Times are medians of interleaved runs, in milliseconds; a machine that
is shared moves them by a tenth to a third."""


def _sizes(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result["sizes"]
    yield "## Parameters and multiply-adds of MobileViTv2, 256 x 256"
    yield report.markdown(
        rows,
        {
            "width": "width",
            "paper_parameters_m": "parameters, paper (M)",
            "zoo_parameters_m": "authors' model list (M)",
            "parameters_m": "timm (M)",
            "paper_gflops": "GFLOPs, paper",
            "gmacs": "10^9 multiply-adds, timm",
            "patched_gmacs": "after `patch`",
        },
    )
    yield (
        "Counted by `torch.utils.flop_counter.FlopCounterMode`: matrix products and convolutions, "
        "nothing pointwise. It counts two FLOPs a multiply-add, and here its figure is halved: "
        f"unhalved it would be {rows[0]['gflops_two_a_multiply_add']:.2f} at "
        f"{rows[0]['width']}, where the paper says {rows[0]['paper_gflops']:g}. The paper's GFLOPs "
        "are therefore multiply-adds (MACs), as is usual in papers on mobile networks."
    )
    off = [row for row in rows if not (row["parameters_agree"] and row["gmacs_agree"])]
    if not off:
        yield "Every figure agrees with the paper's to its last digit."
    for row in off:
        yield (
            f"{row['width']} differs from the paper in the last digit or more: "
            f"{row['parameters_m']:.3f} M parameters (paper {row['paper_parameters_m']:g}), "
            f"{row['gmacs']:.3f} x 10^9 multiply-adds (paper {row['paper_gflops']:g}; this count "
            f"is {row['gmacs'] / row['paper_gflops'] - 1:+.1%} from it). "
            + (
                f"The authors' own list of models has {row['zoo_parameters_m']:g} M too. "
                if round(row["parameters_m"], 1) == row["zoo_parameters_m"]
                else ""
            )
            + "We do not know why."
        )
    saved = [1 - row["patched_gmacs"] / row["gmacs"] for row in rows]
    yield (
        f"`patch` changes no parameter and saves {min(saved):.1%} to {max(saved):.1%} of the "
        "multiply-adds: the key projection of every token, of which one a slice is left. The "
        "operators tell the counter what they compute (`sep_attn.flops`); without that they "
        "would count as nothing."
    )


def _latency(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result["latency"]
    size = result["image_size"]
    yield f"## Table 1: MobileViT with each attention unit, {size} x {size}"
    yield report.markdown(
        [{**row, "paper": PHONE.get(row["contender"])} for row in result["models"]],
        {
            "label": "model",
            "parameters_m": "parameters (M)",
            "gmacs": "10^9 multiply-adds",
            "attention_gmacs": "of them attention",
            "paper": "paper, on a phone (ms)",
        },
    )
    yield (
        "timm's `mobilevit_s` stands for the paper's MobileViT (9.9 ms); only its attention is "
        "exchanged. "
        "The paper calls what the exchange gives MobileViTv2, and that model's blocks differ in "
        "more: no fusion block, depthwise convolutions. So the paper's 3.4 ms stands beside both: "
        "`mobilevit_s` with separable attention, where nothing else differs, and "
        "`mobilevitv2_100`, the nearest in width (128, 192, 256 channels against 144, 192, 240). "
        f"At {size} x {size} their layers see {result['models'][0]['tokens']} tokens, never more "
        "than Linformer's p = 256: projecting onto 256 tokens saves nothing there and costs two "
        "products more, which may be why the paper's Linformer is no faster either."
    )
    for part, title in latency.PARTS.items():
        members = [row for row in rows if row["part"] == part]
        if members:
            yield f"### Milliseconds, {title}"
            yield from _latency_tables(members)
    yield "![Latency](paper_latency.png)"
    yield from _latency_words(rows)


def _latency_tables(rows: Sequence[Row]) -> Iterator[str]:
    paper = PHONE if rows[0]["part"] == "model" else {}  # it has whole models only
    for (mode,), members in report.grouped(rows, "mode"):
        if all(row["milliseconds"] is None for row in members):
            reasons = {row["status"] for row in members}
            yield f"`torch.compile`: {'; '.join(sorted(reasons))}."
            continue
        cases = list(dict(report.grouped(members, "batch", "threads")))
        columns = {f"{b} {t}": f"batch {b}, {report.threads(t)}" for b, t in cases}
        lines = []
        for (key,), own in report.grouped(members, "contender"):
            line: dict[str, Any] = {"label": LABELS[key], "paper": paper.get(key)}
            for row in own:
                line[f"{row['batch']} {row['threads']}"] = _cell(row)
            lines.append(line)
        yield f"{'`torch.compile`' if mode == 'compiled' else 'Eager'}; in brackets, times as fast \
as multi-head in the same run:"
        phone = {"paper": "paper, phone"} if paper else {}
        yield report.markdown(lines, {"label": "model", **phone, **columns})
        missing = {row["status"] for row in members if row["status"] != "timed"}
        if missing:
            yield f"Empty cells: {'; '.join(sorted(missing))}."


def _cell(row: Row) -> str:
    if row["milliseconds"] is None:
        return ""
    ratio = row["times_faster_than_multi_head"]
    milliseconds = row["milliseconds"]
    digits = f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return digits + ("" if ratio is None else f" ({ratio:.2f}x)")


def _latency_words(rows: Sequence[Row]) -> Iterator[str]:
    phone = PHONE["multi_head"] / PHONE["literal"]
    (batch, threads), _ = next(report.grouped(rows, "batch", "threads"))
    found = {
        (row["part"], row["contender"]): row["times_faster_than_multi_head"]
        for row in rows
        if (row["batch"], row["threads"], row["mode"]) == (batch, threads, "eager")
    }
    case = f"batch {batch}, {report.threads(threads)}, eager"
    if ("model", "v2") not in found:
        return
    yield (
        f"On the phone the step from multi-head to separable is {phone:.1f}x. Here ({case}) the "
        f"same step within `mobilevit_s` is {found['model', 'literal']:.2f}x in plain PyTorch and "
        f"{found['model', 'sep_attn']:.2f}x with these kernels, and `mobilevitv2_100` is "
        f"{found['model', 'v2']:.2f}x as fast as `mobilevit_s`, patched "
        f"{found['model', 'v2_patched']:.2f}x."
    )
    times = {
        row["part"]: row["milliseconds"]
        for row in rows
        if (row["batch"], row["threads"], row["mode"]) == (batch, threads, "eager")
        and row["contender"] == "multi_head"
    }
    share = times["attention"] / times["model"]
    best = max(found["model", key] for key in ("literal", "sep_attn", "v2", "v2_patched"))
    if best < phone * 0.9:
        yield (
            "So this machine does not reproduce the paper's ratio. To save 6.5 of 9.9 ms by "
            "attention alone, attention must have been at least two thirds of the model on the "
            f"phone; here its layers are {share:.0%} of it. They gain "
            f"{found['attention', 'literal']:.2f}x, and {found['attention', 'sep_attn']:.2f}x "
            "with these kernels; what is round them stays as it is. The paper's phone (an "
            "iPhone 12) is not at hand, and what its runtime makes of batch-wise products cannot "
            "be seen from here."
        )
    else:
        yield "So the paper's ratio is reached or passed here."
    linformer, phone_linformer = found["model", "linformer"], PHONE["multi_head"] / 10.2
    agreed = "as" if (linformer < 1) == (phone_linformer < 1) else "unlike"
    yield (
        f"Linformer is {linformer:.2f}x as fast as multi-head here, {agreed} on the phone "
        f"({phone_linformer:.2f}x)."
    )


def _figure(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Figure 1: one layer against the number of tokens k"
    yield (
        "d = 512, 8 heads, Linformer with p = 256, batch 1, one thread, float32, eager, as in the "
        "paper, on another processor. No numbers of the paper's curves are at hand, so only their "
        "order can be compared. Milliseconds:"
    )
    columns = {unit.key: unit.label for unit in units_over_tokens.UNITS}
    lines = [
        {"k": f"{k:,}", **{row["unit"]: row["milliseconds"] for row in members}}
        for (k,), members in report.grouped(result["figure"], "tokens")
    ]
    yield report.markdown(lines, {"k": "k", **columns})
    yield "![Figure 1](paper_tokens.png)"
    ratios: dict[int, Row] = {
        k: {row["unit"]: row["times_sep_attn"] for row in members}
        for (k,), members in report.grouped(result["figure"], "tokens")
    }
    slower = [
        k for k, r in ratios.items() if r["literal_eager"] >= min(r["sdpa_block"], r["linformer"])
    ]
    yield (
        "The paper says of separable attention that it costs O(k), without batch-wise products. "
        "Here, in plain PyTorch, "
        + (
            "it is the fastest of the three kinds at every k measured."
            if not slower
            else f"it is not the fastest at k = {', '.join(map(str, slower))}."
        )
    )
    largest = max(ratios)
    last = ratios[largest]
    yield (
        f"At k = {largest:,} the layer of this package is {last['multihead_attention']:.1f}x as "
        f"fast as `nn.MultiheadAttention`, {last['sdpa_block']:.1f}x as fused attention, "
        f"{last['linformer']:.1f}x as Linformer and {last['literal_eager']:.1f}x as the same "
        "function in plain PyTorch. Fused "
        "attention (`scaled_dot_product_attention`) is younger than the paper, and Linformer's "
        "projections do not pay below k = 256, where p is larger than k."
    )
    yield from _profiles(result["profiles"], columns)


def _profiles(profiles: Sequence[Row], labels: Mapping[str, str]) -> Iterator[str]:
    yield f"### Operators with most CPU time at k = {profiles[0]['tokens']}"
    lines = [
        {
            "unit": labels[profile["unit"]] if index == 0 else "",
            "operator": f"`{operator['operator']}`",
            "calls": f"{operator['calls']:g}",
            "microseconds": operator["microseconds"],
            "share": f"{operator['share']:.0%}",
        }
        for profile in profiles
        for index, operator in enumerate(profile["top"])
    ]
    yield report.markdown(
        lines,
        {
            "unit": "unit",
            "operator": "operator",
            "calls": "calls",
            "microseconds": "microseconds, its own",
            "share": "share",
        },
    )
    shares = {profile["unit"]: profile["batched_share"] for profile in profiles}
    quadratic = ("multihead_attention", "sdpa_block", "linformer")
    yield (
        "The paper blames batch-wise products. Their share of the time here: "
        + ", ".join(f"{labels[key]} {shares[key]:.0%}" for key in quadratic)
        + f"; separable attention has none ({shares['literal_eager']:.0%}). "
        + (
            "So on this processor, too, they are most of the time."
            if min(shares[key] for key in quadratic) > 0.5
            else "So on this processor they are not what takes most of the time at this k. The "
            "projections, plain products, take "
            + ", ".join(f"{100 * p['projection_share']:.0f}" for p in profiles[:-1])
            + " % in the order of the table, and the one operator of sep_attn holds its own."
        )
    )


def _features(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result["features"]
    yield "## Detection and segmentation: the encoder at larger images"
    lines = [
        {
            **row,
            "difference": f"{row['difference']:.1e}",
            "error": f"{row['error']:.1e}",
            "case": report.threads(row["threads"]),
        }
        for row in rows
    ]
    yield report.markdown(
        lines,
        {
            "label": "model",
            "image": "image",
            "tokens": "N of its layers",
            "difference": "largest difference",
            "error": "error to float64",
            "case": "threads",
            "before_ms": "before `patch` (ms)",
            "after_ms": "after (ms)",
            "speed_up": "speed-up",
        },
    )
    yield (
        "Every feature map is compared, of the model before and after `patch`, as a share of the "
        "map's largest value; the largest is shown. They are equal to float32 rounding, not bit "
        "for bit: the pooled form sums in another order. At 320 x 320 the numbers of tokens are "
        "no powers of two; at 512 x 512 (output stride 32) they are. The paper reports accuracy "
        "for these tasks, which random weights cannot show; no times of its for the encoder "
        "alone are at hand."
    )


def _sources() -> Iterator[str]:
    yield "## Where the paper's figures come from"
    yield (
        "The paper itself was not at hand when this report was written: its parameters, its "
        "GFLOPs, its three times (9.9, 10.2 and 3.4 ms) and the setting of its Figure 1 are quoted "
        "at second hand."
    )
    yield (
        "Confirmed elsewhere: the parameters, by the authors' "
        "[list of models](https://github.com/apple/ml-cvnets/blob/main/docs/source/en/general/"
        "README-model-zoo.md), but for 18.5 M, which is 18.4 M there; the GFLOPs of x0.5, x1.0 and "
        "x1.75, by timm's model cards; O(k) and the blame on batch-wise products, by the paper's "
        "abstract, which also says that MobileViTv2 runs 3.2 times as fast as MobileViT on a "
        "mobile device; the iPhone 12, by a reader's summary."
    )
    yield (
        "Not confirmed: the three times, and which width of MobileViT they belong to; the GFLOPs "
        "of x1.5 and x2.0, and those of x0.75 and x1.25, where timm's model cards have 1.1 and 2.9 "
        "for the paper's 1.0 and 2.8."
    )
