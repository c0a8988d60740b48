"""timm's MobileViTv2 on two photographs, before and after ``sep_attn.patch``.

``python -m benchmarks.real_model --out DIR`` writes ``real_model.csv`` and ``.json`` (the largest
difference of the logits, the time of the model and of its attention layers) and
``context_scores.png``: where stage 3 looks, as the paper draws it. The weights are random, since no
network is needed; equality and speed do not depend on them, the picture does.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import environment, measure, models, report
from benchmarks.plots import STYLE
from sep_attn import backends, patch
from sep_attn.functional import separable_attention

BEFORE, AFTER = "timm", "timm, patched"
PARTS = {"model": "whole model", "attention": "attention layers alone"}
STAGES = 3
Layers = list[tuple[nn.Module, Tensor]]  # an attention layer and what the model feeds it


def photographs() -> dict[str, Tensor]:
    """scikit-learn's two sample photographs: name -> ``[3, 256, 256]``, float32 in [0, 1].

    timm's MobileViTv2 takes them so: no mean is taken off.
    """
    samples = load_sample_images()
    result = {}
    for filename, pixels in zip(samples.filenames, samples.images, strict=True):
        image = torch.tensor(pixels).permute(2, 0, 1)[None] / 255  # [1, 3, H, W]
        height, width = image.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[:, :, top : top + side, left : left + side]
        size = (models.IMAGE_SIZE, models.IMAGE_SIZE)
        resized = F.interpolate(square, size, mode="bicubic", antialias=True)
        result[Path(filename).stem] = resized[0].clamp(0, 1)
    return result


def capture_attention_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each attention layer receives, ``[B, C, P, N]``, when the model sees the images."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].detach().clone()

    layers = models.attention_layers(model)
    hooks = [
        layer.register_forward_pre_hook(functools.partial(keep, name))
        for name, layer in layers.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return {name: inputs[name] for name in layers}


def run_layers(layers: Layers) -> list[Tensor]:
    """One pass through the attention layers alone."""
    return [layer(x) for layer, x in layers]


def feed(model: nn.Module, inputs: Mapping[str, Tensor]) -> Layers:
    layers = models.attention_layers(model)
    return [(layers[name], x) for name, x in inputs.items()]


class Comparison:
    """The model before and after patching, and a float64 copy of it that judges both."""

    def __init__(self, name: str) -> None:
        self.before = models.timm_mobilevitv2(name)
        self.after = copy.deepcopy(self.before)
        self.patched_layers = patch(self.after)
        self.oracle = copy.deepcopy(self.before).double()

    def check(self, images: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """Compares logits and every attention layer's output.

        Returns:
            The largest difference of the logits (absolute, and as a share of the largest logit),
            and the largest error of the patched model and layers against float64.

        Raises:
            benchmarks.measure.WrongResultError: the patched model is wrong.
        """
        before, after, expected = (
            self.before(images),
            self.after(images),
            self.oracle(images.double()),
        )
        difference = (before - after).abs().max().item()
        double_inputs = {name: x.double() for name, x in inputs.items()}
        return {
            "logit_difference": difference,
            "logit_difference_share": difference / expected.abs().max().item(),
            "logit_error": measure.check("patched model", [after], [expected], [before]),
            "attention_error": measure.check(
                "patched attention layers",
                run_layers(feed(self.after, inputs)),
                run_layers(feed(self.oracle, double_inputs)),
                run_layers(feed(self.before, inputs)),
            ),
        }

    def calls(
        self, part: str, images: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Callable[[], object]]:
        """What is timed: the whole model, or its attention layers on what they receive in it."""
        contenders = {BEFORE: self.before, AFTER: self.after}
        if part == "model":
            return {name: functools.partial(model, images) for name, model in contenders.items()}
        return {
            name: functools.partial(run_layers, feed(model, inputs))
            for name, model in contenders.items()
        }


def measure_case(
    comparison: Comparison, images: Tensor, *, threads: int, seconds: float
) -> list[dict[str, object]]:
    """Checks, then times, the model and its attention layers on a batch of images.

    Raises:
        benchmarks.measure.WrongResultError: the patched model is wrong; nothing is timed then.
    """
    rows = []
    with measure.threads(threads):
        inputs = capture_attention_inputs(comparison.before, images)
        errors = comparison.check(images, inputs)
        for part in PARTS:
            timings = measure.interleaved(
                comparison.calls(part, images, inputs), seconds=seconds / len(PARTS)
            )
            before, after = timings[BEFORE], timings[AFTER]
            rows.append(
                {
                    "part": part,
                    "batch": len(images),
                    "threads": threads,
                    "before_ms": before.median * 1e3,
                    "before_quartiles_ms": _quartiles(before),
                    "after_ms": after.median * 1e3,
                    "after_quartiles_ms": _quartiles(after),
                    "speed_up": before.median / after.median,
                    "samples": after.samples,
                    **errors,
                }
            )
    return rows


def _quartiles(timing: measure.Timing) -> str:
    return f"{timing.lower_quartile * 1e3:.4g} to {timing.upper_quartile * 1e3:.4g}"


def context_scores(layer: nn.Module, x: Tensor) -> Tensor:
    """The softmax scores of one layer as maps, ``[B, H, W]``, 1 where a token weighs the average.

    Args:
        layer: timm's ``LinearSelfAttention``.
        x: its input ``[B, C, P, N]`` of a square map and square patches; every position in a patch
            has a softmax of its own, and the map puts them back where they came from.
    """
    _, scores = separable_attention(
        x,
        layer.qkv_proj.weight.flatten(1),
        layer.qkv_proj.bias,
        layer.out_proj.weight.flatten(1),
        layer.out_proj.bias,
        need_weights=True,
    )
    batch, positions, tokens = scores.shape  # [B, P, N]
    patch_side, grid_side = round(positions**0.5), round(tokens**0.5)
    grid = (scores * tokens).view(batch, patch_side, patch_side, grid_side, grid_side)
    return grid.permute(0, 3, 1, 4, 2).reshape(batch, grid_side * patch_side, -1)


def stage_layers(inputs: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    """The attention inputs of one MobileViTv2 stage; a stage is what shares a map size."""
    sizes = sorted({x.shape[-1] for x in inputs.values()}, reverse=True)
    return {name: x for name, x in inputs.items() if x.shape[-1] == sizes[stage - 1]}


def draw_context_scores(
    model: nn.Module, images: Mapping[str, Tensor], path: Path, *, name: str
) -> None:
    """Draws the context-score maps of the last stage over each photograph.

    Args:
        model: timm's MobileViTv2.
        images: name -> ``[3, H, W]``.
        path: of the PNG.
        name: of the model, for the caption.
    """
    stacked = torch.stack(list(images.values()))
    inputs = stage_layers(capture_attention_inputs(model, stacked), STAGES)
    layers = models.attention_layers(model)
    maps = [context_scores(layers[layer], x) for layer, x in inputs.items()]
    low = min(scores.min().item() for scores in maps)
    high = max(scores.max().item() for scores in maps)
    height, width = stacked.shape[2:]
    rows, columns = len(images), 1 + len(maps)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            rows, columns, figsize=(3 * columns + 0.9, 3.25 * rows + 0.7), layout="constrained"
        )
        for row, (photograph, pixels) in enumerate(images.items()):
            for column, axes in enumerate(panels[row]):
                axes.set_axis_off()
                if column == 0:
                    axes.imshow(pixels.permute(1, 2, 0).numpy())
                    axes.set_title(photograph)
                    continue
                axes.imshow(pixels.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
                overlay = axes.imshow(
                    maps[column - 1][row].numpy(),
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                    interpolation="bicubic",
                    cmap="inferno",
                    alpha=0.55,
                    vmin=low,
                    vmax=high,
                )
                axes.set_title(f"stage {STAGES}, layer {column}")
        bar = figure.colorbar(overlay, ax=panels, shrink=0.7, aspect=30)
        bar.set_label("context score x N (1: the average token)")
        side = maps[0].shape[-1]
        figure.suptitle(
            f"Context scores of {name}, {side} x {side} tokens over the photograph",
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        figure.supxlabel(
            f"Random weights, seed {models.SEED}: the picture shows what the layer computes, "
            "not what a trained model looks at.",
            fontsize=8.5,
            color="#666666",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def print_table(result: Mapping[str, object]) -> None:
    rows = [{**row, "part": PARTS[row["part"]]} for row in result["rows"]]
    columns = {
        "part": "part",
        "batch": "batch",
        "threads": "threads",
        "before_ms": "before\nms",
        "after_ms": "after\nms",
        "speed_up": "speed-up",
        "logit_difference": "largest logit\ndifference",
    }
    print(
        f"\n{result['model']}, random weights (seed {models.SEED}), "
        f"{result['patched_layers']} attention layers patched\n{report.table(rows, columns)}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--model", default="mobilevitv2_100", help="timm's name of a MobileViTv2")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time spent on each batch size and thread count"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, environment.usable_cores()})
    )
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    images = photographs()
    comparison = Comparison(options.model)
    header = {
        **environment.describe(),
        "threads": options.threads,
        "backend": backends.resolve("auto", torch.device("cpu"), torch.float32),
    }
    result = {
        "environment": header,
        "model": options.model,
        "weights": f"random, seed {models.SEED}",
        "photographs": list(images),
        "patched_layers": comparison.patched_layers,
        "rows": [],
    }
    batches = {count: torch.stack(list(images.values())[:count]) for count in (1, len(images))}
    cases = [(batch, threads) for threads in options.threads for batch in batches]
    try:
        for batch, threads in tqdm(cases, desc="real model", unit="case"):
            result["rows"] += measure_case(
                comparison, batches[batch], threads=threads, seconds=options.seconds
            )
            report.write_csv(options.out / "real_model.csv", result["rows"], header)
            report.write_json(options.out / "real_model.json", result)
    except measure.WrongResultError as error:
        report.write_json(options.out / "real_model.json", {**result, "refused": str(error)})
        print(f"refused to time a wrong result: {error}")
        return 1
    print_table(result)
    draw_context_scores(
        comparison.after, images, options.out / "context_scores.png", name=options.model
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
