"""Where a converted ViT should begin: each ``init`` of ``sep_attn.convert``, fine-tuned.

``python -m benchmarks.convert_init --out DIR`` trains a small ViT with multi-head attention on
scikit-learn's handwritten digits (1,797 scans of 8 x 8 pixels, in the package), converts a copy
with each start and ``value_act``, fine-tunes it, and writes ``convert_init_<pool>.csv`` and
``.json``: accuracy and cross-entropy on the scans left out of training, by the epochs of
fine-tuning, over several seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import environment, models, report
from sep_attn import convert
from sep_attn.initialization import FROM_MHA, INITS
from sep_attn.validation import ACTIVATIONS

BATCH = 64
CHECKPOINTS = (1, 3)  # epochs of fine-tuning, beside none and all
POOLS = ("token", "avg")
MULTI_HEAD = "multi-head"


@dataclass(frozen=True)
class Digits:
    """Scans ``[n, 1, 8, 8]`` with values in -1 to 1, and their labels ``[n]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int) -> Digits:
    """Three quarters of the scans for training, the rest for testing, each digit in proportion."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8.0 - 1.0
    labels = torch.from_numpy(bunch.target)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = parts
    return Digits(train_images, train_labels, test_images, test_labels)


def digits_vit(
    seed: int, *, pool: str, embed_dim: int = 64, depth: int = 4, patch_size: int = 2
) -> nn.Module:
    """timm's ViT with multi-head attention over 16 patches of 2 x 2 pixels.

    Args:
        seed: of the weights.
        pool: what the classifier sees: ``"token"``, the class token, or ``"avg"``, the mean token.
        embed_dim: D.
        depth: number of blocks.
        patch_size: pixels along a patch; 1 gives 64 patches.
    """
    timm = models.import_timm()
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        img_size=8,
        patch_size=patch_size,
        in_chans=1,
        num_classes=10,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=4,
        mlp_ratio=2.0,
        global_pool=pool,
        class_token=pool == "token",
    )


def train(
    model: nn.Module, data: Digits, *, epochs: int, learning_rate: float, seed: int
) -> Iterator[float]:
    """Trains as :func:`steps` does; yields the mean training loss of each epoch."""
    losses = steps(model, data, epochs=epochs, learning_rate=learning_rate, seed=seed)
    while epoch := list(itertools.islice(losses, steps_per_epoch(data))):
        yield statistics.fmean(epoch)


def steps_per_epoch(data: Digits) -> int:
    return math.ceil(len(data.train_labels) / BATCH)


def steps(
    model: nn.Module, data: Digits, *, epochs: int, learning_rate: float, seed: int
) -> Iterator[float]:
    """Trains with AdamW, warm-up and cosine decay; yields each step's loss before the step.

    Args:
        model: whose parameters say the dtype; put the generator under autocast for mixed precision.
        data: the scans.
        epochs: over all training scans.
        learning_rate: the highest.
        seed: of the order of the scans.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps_per_epoch(data), pct_start=0.15
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        for batch in order.split(BATCH):
            model.train()
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy in per cent and cross-entropy in nats on the scans left out."""
    logits = model.eval()(data.test_images)
    hits = (logits.argmax(1) == data.test_labels).float()
    return {
        "accuracy": 100.0 * hits.mean().item(),
        "loss": F.cross_entropy(logits, data.test_labels).item(),
    }


def run(
    seed: int, pool: str, activations: Sequence[str], *, epochs: int, tune_epochs: int
) -> list[dict[str, Any]]:
    """One row for each start, activation and checkpoint, and as many for the multi-head model."""
    data, model = digits(seed), digits_vit(seed, pool=pool)
    for _ in train(model, data, epochs=epochs, learning_rate=2e-3, seed=seed):
        pass
    rows: list[dict[str, Any]] = []

    def note(network: nn.Module, init: str, value_act: str, epoch: int) -> None:
        labels = {"pool": pool, "init": init, "value_act": value_act, "epoch": epoch, "seed": seed}
        rows.append({**labels, **evaluate(network, data)})

    def fine_tune(network: nn.Module, init: str, value_act: str) -> None:
        note(network, init, value_act, 0)
        steps = train(network, data, epochs=tune_epochs, learning_rate=1e-3, seed=seed + 1)
        for epoch, _ in enumerate(steps, start=1):
            if epoch in (*CHECKPOINTS, tune_epochs):
                note(network, init, value_act, epoch)

    fine_tune(copy.deepcopy(model), MULTI_HEAD, "")
    for value_act in activations:
        for init in INITS:
            if init == FROM_MHA:
                continue  # one of the others
            converted = copy.deepcopy(model)
            torch.manual_seed(seed)
            convert(converted, init=init, value_act=value_act)
            fine_tune(converted, init, value_act)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds, one row for each model."""
    lines = []
    for model in dict.fromkeys((row["pool"], row["init"], row["value_act"]) for row in rows):
        line: dict[str, Any] = dict(zip(("pool", "init", "value_act"), model, strict=True))
        mine = [row for row in rows if (row["pool"], row["init"], row["value_act"]) == model]
        for kind, decimals in (("accuracy", 1), ("loss", 3)):
            for epoch in dict.fromkeys(row["epoch"] for row in mine):
                values = [row[kind] for row in mine if row["epoch"] == epoch]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                mean = statistics.fmean(values)
                line[f"{kind} {epoch}"] = f"{mean:.{decimals}f} ± {spread:.{decimals}f}"
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert_init", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40, help="of multi-head training")
    parser.add_argument("--tune-epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--pool", nargs="+", choices=POOLS, default=POOLS)
    parser.add_argument("--value-act", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS)
    options = parser.parse_args(arguments)

    header = {
        **environment.describe(),
        "training scans": len(digits(0).train_labels),
        "epochs": options.epochs,
        "seeds": options.seeds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for pool in options.pool:
        path = options.out / f"convert_init_{pool}.csv"
        mine: list[dict[str, Any]] = []
        for seed in tqdm(range(options.seeds), desc=f"convert init, {pool}", unit="model"):
            mine += run(
                seed,
                pool,
                options.value_act,
                epochs=options.epochs,
                tune_epochs=options.tune_epochs,
            )
            report.write_csv(path, mine, header)
            report.write_json(path.with_suffix(".json"), {"environment": header, "rows": mine})
        rows += mine
    lines = summary(rows)
    print(f"\n{report.table(lines, {name: name for name in lines[0]})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
