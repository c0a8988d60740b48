"""A small ViT on real scans, with four kinds of attention: accuracy, loss, cost of a step.

``python -m benchmarks.train --out DIR`` trains timm's ViT on scikit-learn's handwritten digits with
multi-head attention, with Linformer's (the ``linformer`` package), with separable attention as the
paper writes it (``backend="reference"``) and with this package's kernels; the two separable ones
begin with the same weights, so their losses must agree. The trained multi-head models are then
converted and fine-tuned. All get the same scans, order, optimizer and schedule from a seed. Writes
``train.json``, ``train.csv`` (a row a model and seed), ``train_loss.csv`` (a row a seed and step),
``train.md`` and ``train.png``, anew after each seed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from linformer.linformer import LinformerSelfAttention
from torch import nn
from tqdm import tqdm

from benchmarks import convert_init, environment, measure, plots, report
from benchmarks.cpu.memory import tensor_bytes
from sep_attn import convert

POOL = "avg"
HEADS = 4  # of convert_init.digits_vit
LINFORMER_SHARE = 2  # tokens to one of Linformer's k: 16 tokens, k = 8
PATCH_SIZES = (2, 1)  # pixels; the first is the one trained, both are timed
LEARNING_RATE, TUNE_LEARNING_RATE = 2e-3, 1e-3
FIRST_STEPS = 100  # over which the two separable layers' losses are compared


def multi_head(model: nn.Module) -> None:
    """The model as it comes."""


def linformer(model: nn.Module) -> None:
    """Linformer attention with as many heads, and half as many projected tokens as tokens."""
    for block in model.blocks:
        dim, tokens = model.embed_dim, model.patch_embed.num_patches
        block.attn = LinformerSelfAttention(dim, tokens, k=tokens // LINFORMER_SHARE, heads=HEADS)


def literal(model: nn.Module) -> None:
    convert(model, init="fresh", backend="reference")


def ours(model: nn.Module) -> None:
    convert(model, init="fresh")


@dataclass(frozen=True)
class Attention:
    """A kind of attention: ``put`` sets it into a multi-head ViT, drawn anew from torch's seed."""

    label: str
    color: str
    line: str
    put: Callable[[nn.Module], None]


MULTI_HEAD, LINFORMER, LITERAL, OURS, CONVERTED = (
    "multi_head",
    "linformer",
    "literal",
    "sep_attn",
    "converted",
)
ATTENTIONS = {
    MULTI_HEAD: Attention("multi-head", "#D55E00", "-", multi_head),
    LINFORMER: Attention("Linformer", "#E69F00", "-", linformer),
    LITERAL: Attention("separable, literal", "#56B4E9", "-", literal),
    OURS: Attention("separable, sep_attn", "#009E73", "--", ours),
}
CONVERTED_LABEL = "multi-head, converted and fine-tuned"


def build(key: str, seed: int, *, patch_size: int = PATCH_SIZES[0]) -> nn.Module:
    """A ViT with one of ``ATTENTIONS``; all but the attention begins the same for a seed."""
    model = convert_init.digits_vit(seed, pool=POOL, patch_size=patch_size)
    torch.manual_seed(seed)
    ATTENTIONS[key].put(model)
    return model


def fit(
    model: nn.Module,
    data: convert_init.Digits,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: tqdm,
) -> list[float]:
    """Trains; the loss of every step."""
    losses = []
    for loss in convert_init.steps(
        model, data, epochs=epochs, learning_rate=learning_rate, seed=seed
    ):
        losses.append(loss)
        progress.update()
    return losses


def run(
    seed: int, data: convert_init.Digits, *, epochs: int, tune_epochs: int, progress: tqdm
) -> list[dict[str, Any]]:
    """One row for each kind of attention and one for the converted model, with its losses."""
    rows = []
    trained: dict[str, nn.Module] = {}
    for key in ATTENTIONS:
        model = trained[key] = build(key, seed)
        losses = fit(
            model, data, epochs=epochs, learning_rate=LEARNING_RATE, seed=seed, progress=progress
        )
        rows.append(_row(key, seed, model, data, losses))
    model = copy.deepcopy(trained[MULTI_HEAD])
    convert(model)
    before = convert_init.evaluate(model, data)["accuracy"]
    losses = fit(
        model,
        data,
        epochs=tune_epochs,
        learning_rate=TUNE_LEARNING_RATE,
        seed=seed + 1,
        progress=progress,
    )
    rows.append({**_row(CONVERTED, seed, model, data, losses), "accuracy_before": before})
    return rows


def _row(
    key: str, seed: int, model: nn.Module, data: convert_init.Digits, losses: list[float]
) -> dict[str, Any]:
    return {
        "attention": key,
        "seed": seed,
        "steps": len(losses),
        **convert_init.evaluate(model, data),
        "accuracy_before": None,
        "losses": losses,
    }


def step_costs(
    data: convert_init.Digits, *, seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    """Time and memory of one training step at a full batch, for every kind and patch size.

    A step is forward, backward and AdamW's update. Memory is the most that torch's allocator held
    at once during it above weights, gradients and optimizer state, which lie there before.
    """
    images, labels = (
        data.train_images[: convert_init.BATCH],
        data.train_labels[: convert_init.BATCH],
    )
    rows = []
    for patch_size in PATCH_SIZES:
        models = {key: build(key, 0, patch_size=patch_size) for key in ATTENTIONS}
        calls = {key: _step(model, images, labels) for key, model in models.items()}
        for call in calls.values():
            call()  # makes gradients and optimizer state
        peaks = {key: tensor_bytes(call)[1] for key, call in calls.items()}
        timings = measure.interleaved(calls, seconds=seconds, min_rounds=min_rounds)
        for key, timing in timings.items():
            rows.append(
                {
                    "attention": key,
                    "tokens": models[key].patch_embed.num_patches,
                    "parameters": sum(parameter.numel() for parameter in models[key].parameters()),
                    "milliseconds": timing.median * 1e3,
                    "lower_quartile": timing.lower_quartile * 1e3,
                    "upper_quartile": timing.upper_quartile * 1e3,
                    "ratio_to_literal": timing.ratio_to(timings[LITERAL]),
                    "peak_bytes": peaks[key],
                }
            )
    return rows


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    # A rate of zero: the work of a step, and weights that stay however often it runs.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.train()

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()

    return step


def agreement(rows: Sequence[Mapping[str, Any]], steps: int = FIRST_STEPS) -> list[float]:
    """The largest difference of the two separable layers' first losses, for each seed."""
    losses = {(row["attention"], row["seed"]): row["losses"] for row in rows}
    return [
        max(
            abs(mine - theirs)
            for mine, theirs in zip(
                losses[OURS, seed][:steps], losses[LITERAL, seed][:steps], strict=True
            )
        )
        for key, seed in losses
        if key == OURS
    ]


def summary(
    rows: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """One line for each model: mean and sample standard deviation over the seeds, and its costs."""
    lines = []
    for key in (*ATTENTIONS, CONVERTED):
        mine = [row for row in rows if row["attention"] == key]
        line = {"attention": ATTENTIONS[key].label if key in ATTENTIONS else CONVERTED_LABEL}
        line["accuracy"] = mean_and_spread([row["accuracy"] for row in mine], 1)
        line["loss"] = mean_and_spread([row["loss"] for row in mine], 3)
        own = [cost for cost in costs if cost["attention"] == (OURS if key == CONVERTED else key)]
        line["parameters"] = f"{own[0]['parameters']:,}"
        for cost in own:
            line[f"milliseconds {cost['tokens']}"] = f"{cost['milliseconds']:.2f}"
            line[f"peak {cost['tokens']}"] = f"{cost['peak_bytes'] / 2**20:.2f}"
        lines.append(line)
    return lines


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{decimals}f} ± {spread:.{decimals}f}"


def columns(costs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    tokens = dict.fromkeys(cost["tokens"] for cost in costs)
    return {
        "attention": "attention",
        "accuracy": "unseen scans right, %",
        "loss": "cross-entropy on them",
        "parameters": "parameters",
        **{f"milliseconds {count}": f"ms a step, {count} tokens" for count in tokens},
        **{f"peak {count}": f"peak MiB a step, {count} tokens" for count in tokens},
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    settings, rows, costs = result["settings"], result["rows"], result["costs"]
    before = [row["accuracy_before"] for row in rows if row["attention"] == CONVERTED]
    return "\n\n".join(
        [
            "# A ViT on handwritten digits, four kinds of attention",
            f"{environment.machine_line(result['environment'])}, "
            f"{result['environment']['date'][:10]}, commit {result['environment']['commit']}. "
            f"timm's ViT, D = 64, 4 blocks, mean token, {settings['training_scans']} scans for "
            f"training and {settings['test_scans']} for testing, split anew for each seed; "
            f"{settings['epochs']} epochs in batches of {convert_init.BATCH}, AdamW; the "
            f"converted model {settings['tune_epochs']} more from the trained multi-head one. Mean "
            f"and sample standard deviation of {settings['seeds']} seeds.",
            report.markdown(summary(rows, costs), columns(costs)),
            "A step is forward, backward and AdamW's update of 64 scans; times are medians of "
            "interleaved runs; peak memory is what torch's allocator held above weights, gradients "
            f"and optimizer state. The models were trained on {costs[0]['tokens']} tokens. The "
            "converted one's step is that of sep_attn.",
            "Right after the conversion, before fine-tuning: "
            f"{mean_and_spread(before, 1)} % right.",
            "Largest difference between the two separable layers' losses in the first "
            f"{FIRST_STEPS} steps, for each seed: "
            + ", ".join(f"{difference:.1e}" for difference in agreement(rows))
            + ".",
            "![Training loss](train.png)",
            "",
        ]
    )


def losses_by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each seed and step, one column for each model; fine-tuning may be shorter."""
    lines = []
    for (seed,), mine in report.grouped(rows, "seed"):
        curves = itertools.zip_longest(*(row["losses"] for row in mine))
        names = [row["attention"] for row in mine]
        for step, losses in enumerate(curves):
            lines.append({"seed": seed, "step": step, **dict(zip(names, losses, strict=True))})
    return lines


def write(result: Mapping[str, Any], out: Path) -> None:
    header = result["environment"]
    rows = [
        {name: value for name, value in row.items() if name != "losses"} for row in result["rows"]
    ]
    report.write_csv(out / "train.csv", rows, header)
    # The losses are in a file of their own; in JSON they would be most of it.
    report.write_csv(out / "train_loss.csv", losses_by_step(result["rows"]), header)
    report.write_json(
        out / "train.json", {**result, "rows": rows, "agreement": agreement(result["rows"])}
    )
    (out / "train.md").write_text(to_markdown(result))
    colors = {key: (each.label, each.color, each.line) for key, each in ATTENTIONS.items()}
    colors[CONVERTED] = (CONVERTED_LABEL, "#CC79A7", "-")
    plots.loss_curves(result, colors, out / "train.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="of training")
    parser.add_argument("--tune-epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch: a trial run")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.tune_epochs = 2, 1, 1

    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    header = environment.describe()
    sets = [convert_init.digits(seed) for seed in range(options.seeds)]
    costs = step_costs(
        sets[0], seconds=0.2 if options.quick else 10, min_rounds=1 if options.quick else 5
    )
    epochs = len(ATTENTIONS) * options.epochs + options.tune_epochs
    total = sum(epochs * convert_init.steps_per_epoch(data) for data in sets)
    rows: list[dict[str, Any]] = []
    with tqdm(total=total, desc="train", unit="step") as progress:
        for seed, data in enumerate(sets):
            rows += run(
                seed,
                data,
                epochs=options.epochs,
                tune_epochs=options.tune_epochs,
                progress=progress,
            )
            settings = {
                "training_scans": len(data.train_labels),
                "test_scans": len(data.test_labels),
                "seeds": seed + 1,
                "epochs": options.epochs,
                "tune_epochs": options.tune_epochs,
                "seconds": time.perf_counter() - start,
            }
            result = {"environment": header, "settings": settings, "rows": rows, "costs": costs}
            write(result, options.out)
    print(f"\n{report.table(summary(rows, costs), columns(costs))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
