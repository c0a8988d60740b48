"""The fused CPU forward against timm's layer and against its two products alone.

``python -m benchmarks.layer_table --out DIR`` writes ``layer_table.csv`` and ``.json``. Each shape
is timed on one thread and on all, beside the figures of an earlier prototype.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import ceilings, environment, measure, registry, report
from benchmarks.registry import CONTENDERS, LAYER_SHAPES, LayerShape
from sep_attn import backends

# Figures of a prototype of the pooled form (float32, AVX-512, 100 lines, never part of this
# package) on 4 cores of a Sapphire Rapids: (timm's time / its time, its time / two products),
# by number of threads. Its weights were packed beforehand for the second.
PROTOTYPE = {
    LayerShape(4, 16, 256): {1: (1.0, 1.32), 4: (1.3, 1.10)},
    LayerShape(4, 64, 192): {1: (1.7, 1.00), 4: (3.9, 0.98)},
    LayerShape(4, 256, 128): {1: (3.6, 1.08), 4: (4.5, 1.00)},
    LayerShape(4, 256, 64): {1: (2.3, 1.11), 4: (7.4, 1.25)},
    LayerShape(1, 197, 768): {1: (1.5, 1.01), 4: (1.4, 1.05)},
    LayerShape(1, 4096, 128): {1: (2.0, 1.12), 4: (3.5, 0.98)},
    LayerShape(1, 16384, 128): {1: (2.5, 1.14), 4: (2.6, 1.00)},
    LayerShape(1, 4096, 512): {1: (1.7, 0.98), 4: (1.9, 1.07)},
}

PRODUCTS = "two torch.mm"
# name of a column -> (contender, whether it takes [1, D, slices, N] instead of [slices, N, D])
COLUMNS = {
    "timm": ("timm_eager", True),
    "sep_attn patches": ("sep_attn_patches", True),
    "sep_attn tokens": ("sep_attn", False),
}


@dataclass(frozen=True)
class Case:
    """The contenders at one shape, on the same values: slice p of ``[1, D, P, N]`` is image p of
    ``[P, N, D]``."""

    calls: dict[str, measure.Call]
    expected: Tensor  # [P, N, D], float64
    plain: Tensor  # [P, N, D], eager PyTorch in float32

    def check(self) -> None:
        """Raises :class:`benchmarks.measure.WrongResultError` if a layer is wrong."""
        for name, (_, takes_patches) in COLUMNS.items():
            out = self.calls[name]()
            tokens = out.squeeze(0).permute(1, 2, 0) if takes_patches else out
            measure.check(name, [tokens], [self.expected], [self.plain])


def build_case(shape: LayerShape) -> Case:
    x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, "cpu", torch.float32)
    patches = x.permute(2, 0, 1).unsqueeze(0).contiguous()  # [1, D, P, N]
    weights = registry.SEPARABLE.weights(shape.dim).to("cpu", torch.float32)
    calls: dict[str, measure.Call] = {}
    for name, (key, takes_patches) in COLUMNS.items():
        module = CONTENDERS[key].build(weights).eval()
        calls[name] = partial(module, patches if takes_patches else x)
    expected = registry.SEPARABLE.oracle(
        weights.to("cpu", torch.float64), x.double(), torch.arange(shape.tokens)
    )
    return Case(calls, expected, CONTENDERS["literal_eager"].build(weights)(x))


@torch.no_grad()
def measure_shape(shape: LayerShape, *, seconds: float) -> dict[str, Any]:
    """One row: every layer is checked, then all are timed in turns with the products alone.

    A wrong layer's name and error stand in ``status``, and nothing in the row is timed.
    """
    case, status = build_case(shape), "timed"
    times: dict[str, float] = {}
    try:
        case.check()
    except measure.WrongResultError as error:
        status = f"refused: {error}"
    else:
        x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, "cpu", torch.float32)
        calls = {**case.calls, PRODUCTS: ceilings.cpu_products(x, mode="forward")}
        timings = measure.interleaved(calls, seconds=seconds)
        times = {name: timing.median for name, timing in timings.items()}
    count = torch.get_num_threads()
    timm_prototype, products_prototype = PROTOTYPE[shape].get(count, (None, None))

    def ratio(numerator: str, denominator: str) -> float | None:
        return times[numerator] / times[denominator] if times else None

    return {
        "slices": shape.slices,
        "tokens": shape.tokens,
        "dim": shape.dim,
        "threads": count,
        **{f"{name} ms": times[name] * 1e3 if times else None for name in (*COLUMNS, PRODUCTS)},
        "timm / sep_attn": ratio("timm", "sep_attn patches"),
        "timm / prototype": timm_prototype,
        "sep_attn / products": ratio("sep_attn tokens", PRODUCTS),
        "prototype / products": products_prototype,
        "sep_attn patches / products": ratio("sep_attn patches", PRODUCTS),
        "status": status,
    }


def thread_counts() -> list[int]:
    """One thread, and the prototype's four or as many as torch uses here."""
    return sorted({1, min(4, torch.get_num_threads())})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row")
    parser.add_argument("--threads", type=int, nargs="+", default=thread_counts())
    options = parser.parse_args(arguments)

    rows = []
    header = {
        **environment.describe(),
        "threads": options.threads,
        "backend": backends.resolve("auto", torch.device("cpu"), torch.float32),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [(shape, count) for count in options.threads for shape in LAYER_SHAPES]
    for shape, count in tqdm(cases, desc="layer table", unit="row"):
        with measure.threads(count):
            rows.append(measure_shape(shape, seconds=options.seconds))
        report.write_csv(options.out / "layer_table.csv", rows, header)
        report.write_json(options.out / "layer_table.json", {"environment": header, "rows": rows})
    columns = {name: name.replace(" / ", "\n/ ").replace(" ms", "\nms") for name in rows[0]}
    print(f"\n{report.table(rows, columns)}")
    return 0 if all(row["status"] == "timed" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
