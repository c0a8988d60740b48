"""MobileViTv2 in ONNX Runtime: the unpatched model's export against the patched one's.

``python -m benchmarks.export --out DIR`` writes ``export.csv`` and ``.json``: the whole model, and
the attention layers alone on what they receive in it. Both exports are made by
``torch.onnx.export`` in the same way and hold standard operators only; each is compared with a
float64 copy of the model before anything is timed. The weights are random, since no network is
needed; equality and speed do not depend on them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import environment, measure, models, report
from benchmarks.real_model import capture_attention_inputs
from sep_attn import patch

UNPATCHED, PATCHED = "timm", "timm, patched"
EXAMPLE_BATCH = 2  # torch.export would take a batch of 1 for a constant
PARTS = {"model": "whole model", "attention": "attention layers alone"}


class AttentionLayers(nn.Module):
    """The attention layers of a model as one module: as many inputs and outputs as layers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


@dataclass(frozen=True)
class Part:
    """The model, or its attention layers, before and after patching."""

    unpatched: nn.Module
    patched: nn.Module
    example: tuple[Tensor, ...]  # of batch EXAMPLE_BATCH

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(x[:batch] for x in self.example)


def to_onnx(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """An ONNX model of standard operators with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    axes = tuple({0: batch} for _ in example)
    shapes = (axes,) if isinstance(module, AttentionLayers) else axes  # *inputs is one argument
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=shapes)
    return program.model_proto


def onnxruntime_call(
    proto: Any, inputs: Sequence[Tensor], *, threads: int
) -> Callable[[], list[Any]]:
    """A call without arguments that runs the model on these inputs, on CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return functools.partial(session.run, None, feed)


def results_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    results = module(*inputs)
    return list(results) if isinstance(results, tuple) else [results]


def check(
    part: Part, calls: Mapping[str, Callable[[], list[Any]]], inputs: Sequence[Tensor]
) -> dict[str, float]:
    """The error of each export against the unpatched model in float64.

    Raises:
        benchmarks.measure.WrongResultError: an export is wrong.
    """
    oracle = copy.deepcopy(part.unpatched).double()
    expected = results_of(oracle, [x.double() for x in inputs])
    plain = results_of(part.unpatched, inputs)
    return {
        f"{name} error": measure.check(
            f"export of {name}", [torch.from_numpy(value) for value in call()], expected, plain
        )
        for name, call in calls.items()
    }


def build_parts(name: str) -> tuple[dict[str, Part], int]:
    """Both parts of timm's model, and how many layers were patched."""
    before = models.timm_mobilevitv2(name)
    after = copy.deepcopy(before)
    patched_layers = patch(after)
    generator = torch.Generator().manual_seed(models.SEED)
    size = (EXAMPLE_BATCH, 3, models.IMAGE_SIZE, models.IMAGE_SIZE)
    images = torch.rand(size, generator=generator)
    inputs = tuple(capture_attention_inputs(before, images).values())
    layers = [
        AttentionLayers(list(models.attention_layers(model).values())) for model in (before, after)
    ]
    return {
        "model": Part(before, after, (images,)),
        "attention": Part(*layers, inputs),
    }, patched_layers


def operator_counts(proto: Any) -> dict[str, int]:
    counts = collections.Counter(node.op_type for node in proto.graph.node)
    return dict(sorted(counts.items()))


def measure_case(
    name: str, part: Part, protos: Mapping[str, Any], *, batch: int, threads: int, seconds: float
) -> dict[str, Any]:
    """Checks, then times, both exports on a batch.

    Raises:
        benchmarks.measure.WrongResultError: an export is wrong; nothing is timed then.
    """
    inputs = part.inputs(batch)
    calls = {key: onnxruntime_call(proto, inputs, threads=threads) for key, proto in protos.items()}
    errors = check(part, calls, inputs)
    timings = measure.interleaved(calls, seconds=seconds)
    unpatched, patched = timings[UNPATCHED], timings[PATCHED]
    return {
        "part": name,
        "batch": batch,
        "threads": threads,
        "unpatched_ms": unpatched.median * 1e3,
        "unpatched_quartiles_ms": _quartiles(unpatched),
        "patched_ms": patched.median * 1e3,
        "patched_quartiles_ms": _quartiles(patched),
        "speed_up": unpatched.median / patched.median,
        "samples": patched.samples,
        **errors,
    }


def _quartiles(timing: measure.Timing) -> str:
    return f"{timing.lower_quartile * 1e3:.4g} to {timing.upper_quartile * 1e3:.4g}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--model", default="mobilevitv2_100", help="timm's name of a MobileViTv2")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on each row")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, environment.usable_cores()})
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    parts, patched_layers = build_parts(options.model)
    exports = {
        name: {
            UNPATCHED: to_onnx(part.unpatched, part.example),
            PATCHED: to_onnx(part.patched, part.example),
        }
        for name, part in parts.items()
    }
    (opset,) = {
        proto.opset_import[0].version for pair in exports.values() for proto in pair.values()
    }
    header = {
        **environment.describe(),
        "threads": options.threads,
        "onnx": importlib.metadata.version("onnx"),
        "onnxscript": importlib.metadata.version("onnxscript"),
        "onnxruntime": onnxruntime.__version__,
        "opset": opset,
    }
    result: dict[str, Any] = {
        "environment": header,
        "model": options.model,
        "weights": f"random, seed {models.SEED}",
        "patched_layers": patched_layers,
        "operators": {
            name: {key: operator_counts(proto) for key, proto in pair.items()}
            for name, pair in exports.items()
        },
        "rows": [],
    }
    cases = [
        (name, batch, threads)
        for threads in options.threads
        for batch in options.batches
        for name in parts
    ]
    try:
        for name, batch, threads in tqdm(cases, desc="export", unit="case"):
            row = measure_case(
                name,
                parts[name],
                exports[name],
                batch=batch,
                threads=threads,
                seconds=options.seconds,
            )
            result["rows"].append(row)
            report.write_csv(options.out / "export.csv", result["rows"], header)
            report.write_json(options.out / "export.json", result)
    except measure.WrongResultError as error:
        report.write_json(options.out / "export.json", {**result, "refused": str(error)})
        print(f"refused to time a wrong result: {error}")
        return 1
    rows = [{**row, "part": PARTS[row["part"]]} for row in result["rows"]]
    columns = {
        "part": "part",
        "batch": "batch",
        "threads": "threads",
        "unpatched_ms": "timm\nms",
        "patched_ms": "patched\nms",
        "speed_up": "speed-up",
    }
    print(f"\n{options.model} in ONNX Runtime, opset {opset}\n{report.table(rows, columns)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
