"""The tables measured on a GPU, each written row by row so that a run cut off leaves something.

``python -m benchmarks.gpu_tables TABLE --out DIR`` writes ``TABLE.csv`` and ``TABLE.json``, and a
picture of ``floor`` and ``attention``. What is compared was measured in turns, in one run; what is
not the oracle's is not timed.

========= =========================================================================================
floor     forward at large shapes, against what any correct program must move and compute
timm      MobileViTv2's nine layers at batch 256, against timm's module, eager and compiled
attention against a multi-head block on ``scaled_dot_product_attention``, D = 512, 8 heads
latency   one call at batch 1, N = 256, D = 128: host time, launches, time under CUDA graphs
memory    peak extra memory of forward and backward, against timm's module
========= =========================================================================================
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import ceilings, environment, measure, onchip, registry, report, roofline
from benchmarks.ceilings import GpuRates
from benchmarks.registry import CONTENDERS, MODES, OURS, Contender, LayerShape
from sep_attn import backends
from sep_attn.triton_kernels.configs import architecture

# What one is to see on an H100 in bfloat16: at most this many times the floor, at least this many
# times as fast, at most this much.
FLOOR_TARGET = 1.25
SPEEDUP_TARGETS = {
    ("forward", "timm_eager"): 6.0,
    ("forward", "timm_max_autotune"): 2.5,
    ("training", "timm_eager"): 4.0,
    ("training", "timm_max_autotune"): 1.8,
}
ATTENTION_TARGETS = {16_384: 25.0, 65_536: 120.0}  # by tokens; elsewhere faster
MEMORY_TARGET = 1 / 3
HOST_TARGET, LAUNCH_TARGET, GRAPH_TARGET = 30.0, 3, 8.0  # microseconds, launches, microseconds

OURS_PATCHES = "sep_attn_patches"
# Each of timm's, and ours run in the same way.
ALIKE = {"timm_eager": OURS_PATCHES, "timm_max_autotune": "sep_attn_max_autotune"}
ATTENTION_DIM = 512
ATTENTION_TOKENS = (
    16_384,
    65_536,
    4096,
    1024,
    256,
    64,
    16,
)  # those with a target of their own first
ATTENTION_WORK = 65_536  # tokens of all slices together, where they are more than one
LATENCY_SHAPE = LayerShape(1, 256, 128)
LONG_IN_MEMORY = registry.LONG_SLICES[:2]  # of the long slices, those of the memory table
HOST_CALLS = 50  # issued one after another without waiting

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where and how every table is measured."""

    device: torch.device
    dtype: torch.dtype
    seconds: float = 0.4  # of timing, a row
    rates: GpuRates = roofline.H100  # what floors are worked out with

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def geomean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def measured(
    settings: Settings, shape: LayerShape, contenders: Iterable[Contender], *, mode: str
) -> tuple[dict[str, measure.Timing], dict[str, str]]:
    """Checks and times contenders in turns.

    Returns:
        Timings and states by key; a contender that is wrong or fails has a state that says so, and
        no timing.
    """
    x = registry.draw_tokens(shape.slices, shape.tokens, shape.dim, settings.device, settings.dtype)
    torch.compiler.reset()  # its limit of compilations is for one shape, not for a table
    states: dict[str, str] = {}
    calls: dict[str, measure.Call] = {}
    expected: dict[str, list[Tensor]] = {}
    for contender in contenders:
        family = contender.family
        try:
            if family.name not in expected:
                weights = family.weights(shape.dim).to(settings.device, settings.dtype)
                expected[family.name] = registry.expected_results(family, weights, x, mode=mode)
            module = build(settings, contender, shape.dim).train(mode == "training")
            registry.verify(contender, module, x, expected[family.name], mode=mode)
            calls[contender.key] = timed_call(contender, module, x, mode=mode)
            states[contender.key] = "timed"
        except measure.WrongResultError as error:
            states[contender.key] = f"refused: {error}"
        except Exception as error:  # one contender's failure must not cost the others' figures
            states[contender.key] = _failure(error)
    del expected
    timings: dict[str, measure.Timing] = {}
    with torch.set_grad_enabled(mode == "training"):
        try:
            timings = measure.interleaved(
                calls,
                seconds=settings.seconds if calls else 0.0,
                min_rounds=3,
                sample=measure.sampler_for(settings.device),
            )
        except Exception as error:  # nor one shape's those of the others
            states |= dict.fromkeys(calls, _failure(error))
    return timings, states


def build(settings: Settings, contender: Contender, dim: int) -> nn.Module:
    weights = contender.family.weights(dim)
    return contender.build(weights.to(settings.device, settings.dtype))


def timed_call(contender: Contender, module: nn.Module, x: Tensor, *, mode: str) -> measure.Call:
    """One step, on inputs that rotate through more than a GPU's L2."""
    copies = measure.copies_beyond_cache(x.numel() * x.element_size(), x.device)
    inputs = [contender.layout.from_tokens(x)]
    inputs += [torch.randn_like(inputs[0]) for _ in range(copies - 1)]
    if mode == "forward":
        return measure.rotated(module, inputs)
    pairs = [(one.detach().requires_grad_(), torch.randn_like(one)) for one in inputs]
    return measure.rotated(registry.training_step(module), pairs)


def _shape_columns(shape: LayerShape) -> Row:
    return {"slices": shape.slices, "tokens": shape.tokens, "dim": shape.dim}


def _microseconds(timings: dict[str, measure.Timing], key: str) -> float | None:
    return timings[key].median * 1e6 if key in timings else None


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def _failure(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"failed: {type(error).__name__}: {first_line}"


def _status(states: dict[str, str]) -> str:
    wrong = [f"{key}: {state}" for key, state in states.items() if state != "timed"]
    return "; ".join(wrong) or "timed"


def floor_rows(
    settings: Settings,
    shapes: Sequence[LayerShape] = (*registry.SHORT_SLICES, *registry.LONG_SLICES),
) -> Iterator[Row]:
    """A forward pass against the floor, in the layout of ViTs."""
    for shape in shapes:
        timings, states = measured(settings, shape, [CONTENDERS[OURS]], mode="forward")
        taken = _microseconds(timings, OURS)
        floor = roofline.forward_floor(shape, settings.itemsize, settings.rates) * 1e6
        launches = roofline.layer_seconds(shape, settings.itemsize, settings.rates, mode="forward")
        yield {
            **_shape_columns(shape),
            "path": roofline.path_of(shape, settings.itemsize),
            "us": taken,
            "floor us": floor,
            "launches us": launches * 1e6,
            "times floor": _ratio(taken, floor),
            "target": FLOOR_TARGET,
            "status": _status(states),
        }


def timm_rows(
    settings: Settings,
    layers: Sequence[LayerShape] = registry.MOBILEVITV2_LAYERS,
    rivals: Sequence[str] = tuple(ALIKE),
) -> Iterator[Row]:
    """MobileViTv2's layers in ``[B, D, P, N]``, and the geometric means over all of them; one rival
    after another, for the last takes minutes to compile. Eager is compared with eager, compiled
    with compiled, whose CUDA graphs cost the host a single launch; our eager time stands beside."""
    counts = collections.Counter(layers)
    layout = registry.patches_layout(registry.MOBILEVITV2_PATCHES)
    for key, mode in itertools.product(rivals, MODES):
        names = dict.fromkeys((key, ALIKE[key], OURS_PATCHES))
        contenders = [dataclasses.replace(CONTENDERS[name], layout=layout) for name in names]
        ratios: list[float] = []
        for shape, count in counts.items():
            timings, states = measured(settings, shape, contenders, mode=mode)
            ours, theirs = _microseconds(timings, ALIKE[key]), _microseconds(timings, key)
            ratio = _ratio(theirs, ours)
            ratios += [] if ratio is None else [ratio] * count
            floor = roofline.layer_seconds(shape, settings.itemsize, settings.rates, mode=mode)
            row = {
                "rival": key,
                "mode": mode,
                "layers": count,
                **_shape_columns(shape),
                "rival us": theirs,
                "sep_attn us": ours,
                "rival / sep_attn": ratio,
                "sep_attn eager us": _microseconds(timings, OURS_PATCHES),
                "launches us": floor * 1e6,
                "target": None,
            }
            yield row | {"status": _status(states)}
        mean = geomean(ratios) if len(ratios) == len(layers) else None
        row = dict.fromkeys(row) | {"rival": key, "mode": mode, "layers": len(ratios)}
        row |= {"rival / sep_attn": mean, "target": SPEEDUP_TARGETS[mode, key]}
        yield row | {"status": f"geomean over {len(ratios)} of {len(layers)} layers"}


def attention_rows(
    settings: Settings,
    tokens: Sequence[int] = ATTENTION_TOKENS,
    dim: int = ATTENTION_DIM,
    work: int = ATTENTION_WORK,
) -> Iterator[Row]:
    """Against multi-head attention: batch 1, and as many images as make ``work`` tokens."""
    contenders = [CONTENDERS["sdpa_block"], CONTENDERS[OURS]]
    for count in tokens:
        for batch in dict.fromkeys((1, max(1, work // count))):
            shape = LayerShape(batch, count, dim)
            timings, states = measured(settings, shape, contenders, mode="forward")
            ours, theirs = _microseconds(timings, OURS), _microseconds(timings, "sdpa_block")
            yield {
                "batch": batch,
                "tokens": count,
                "dim": dim,
                "heads": registry.num_heads(dim),
                "sep_attn us": ours,
                "sdpa_block us": theirs,
                "sdpa_block / sep_attn": _ratio(theirs, ours),
                "target": ATTENTION_TARGETS.get(count, 1.0),
                "status": _status(states),
            }


def host_microseconds(call: measure.Call, wait: Callable[[], object], *, rounds: int = 20) -> float:
    """The median time until a call returns, of ``HOST_CALLS`` issued before the device is waited
    for, so that its own time does not count."""
    taken = []
    for _ in range(rounds):
        wait()
        for _ in range(HOST_CALLS):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    wait()
    return median(taken) * 1e6


def count_launches(call: measure.Call) -> int | None:
    """Kernels of one call on a CUDA device, by the profiler; None where it may not see them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events()) or None


def graph_replay(module: nn.Module, x: Tensor) -> measure.Call:
    """A replay of a CUDA graph of ``module(x)``, checked against the call itself."""
    expected = module(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    out.zero_()
    graph.replay()
    measure.check("replay of a CUDA graph", [out], [expected.double()])
    return graph.replay


def graph_microseconds(settings: Settings, module: nn.Module, x: Tensor) -> float:
    replay = {"graph": graph_replay(module, x)}
    sample = measure.sampler_for(settings.device)
    timings = measure.interleaved(replay, seconds=settings.seconds, sample=sample)
    return timings["graph"].median * 1e6


@torch.no_grad()
def latency_rows(settings: Settings, shape: LayerShape = LATENCY_SHAPE) -> Iterator[Row]:
    """One small call: on the host, in launches, and replayed from a CUDA graph."""
    on_gpu = settings.device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for key in (OURS, "timm_eager"):
        contender = CONTENDERS[key]
        timings, states = measured(settings, shape, [contender], mode="forward")
        row = {"contender": key, **_shape_columns(shape), "us": _microseconds(timings, key)}
        row |= dict.fromkeys(("host us", "launches", "graph us"))
        if states[key] == "timed":
            x = registry.draw_tokens(
                shape.slices, shape.tokens, shape.dim, settings.device, settings.dtype
            )
            x = contender.layout.from_tokens(x)
            module = build(settings, contender, shape.dim).eval()
            figures: dict[str, Callable[[], float | None]] = {
                "host us": partial(host_microseconds, partial(module, x), wait)
            }
            if on_gpu:
                figures["launches"] = partial(count_launches, partial(module, x))
                figures["graph us"] = partial(graph_microseconds, settings, module, x)
            for column, figure in figures.items():
                try:
                    row[column] = figure()
                except Exception as error:  # one figure's failure must not cost the others
                    states[f"{column} of {key}"] = _failure(error)
        targets = f"host {HOST_TARGET:g}, launches 1 or {LAUNCH_TARGET}, graph {GRAPH_TARGET:g}"
        yield row | {"target": targets if key == OURS else None, "status": _status(states)}


def cuda_peak(call: measure.Call) -> int:
    """Bytes that a call allocates beyond what was there, at its peak."""
    call()
    torch.cuda.synchronize()
    gc.collect()  # takes long enough for autograd's thread to let go of the last results, too
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_rows(
    settings: Settings,
    layers: Sequence[LayerShape] = (*registry.MOBILEVITV2_LAYERS, *LONG_IN_MEMORY),
    peak: Callable[[measure.Call], int] = cuda_peak,
) -> Iterator[Row]:
    """Peak extra memory of forward and backward; x, weights and the gradient of out are there
    before, all other gradients are not."""
    for shape in dict.fromkeys(layers):
        patches = math.gcd(shape.slices, registry.MOBILEVITV2_PATCHES)
        found: dict[str, int] = {}
        states: dict[str, str] = {}
        for key in ("timm_eager", OURS_PATCHES):
            contender = dataclasses.replace(
                CONTENDERS[key], layout=registry.patches_layout(patches)
            )
            x = registry.draw_tokens(
                shape.slices, shape.tokens, shape.dim, settings.device, settings.dtype
            )
            x = contender.layout.from_tokens(x).detach().requires_grad_()
            try:
                module = build(settings, contender, shape.dim).train()
                step = registry.training_step(module)
                found[key] = peak(partial(step, (x, torch.randn_like(x))))
                del module
            except Exception as error:  # one contender's failure must not cost the other's figure
                states[key] = _failure(error)
            del x
        ours, theirs = found.get(OURS_PATCHES), found.get("timm_eager")
        values = shape.slices * shape.tokens * shape.dim * settings.itemsize
        yield {
            **_shape_columns(shape),
            "sep_attn MB": _ratio(ours, 1e6),
            "timm_eager MB": _ratio(theirs, 1e6),
            "sep_attn / x": _ratio(ours, values),
            "sep_attn / timm_eager": _ratio(ours, theirs),
            "target": MEMORY_TARGET,
            "status": _status(states) if states else "measured",
        }


TABLES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "floor": floor_rows,
    "timm": timm_rows,
    "attention": attention_rows,
    "latency": latency_rows,
    "memory": memory_rows,
}


def draw(name: str, result: dict[str, Any], file: Path) -> None:
    try:
        from benchmarks import plots
    except ImportError as error:  # the machine's Python is taken as it is
        print(f"{file.name} is not drawn: {error}")
    else:
        plots.gpu_table(name, result, file)


def write_table(
    name: str, rows: Iterable[Row], header: dict[str, Any], rates: GpuRates, out: Path
) -> list[Row]:
    """Writes a table anew after each row, then its picture; prints it."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[Row] = []
    result = {"environment": header, "rates": dataclasses.asdict(rates), "rows": written}
    for row in tqdm(rows, desc=name, unit="row"):
        written.append(row)
        report.write_csv(out / f"{name}.csv", written, header)
        report.write_json(out / f"{name}.json", result)
    if written:
        print(f"\n{report.table(written, {key: key.replace(' ', chr(10)) for key in written[0]})}")
        draw(name, result, out / f"{name}.png")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="timing, a row")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_tables needs a GPU, and torch finds none here")
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    rates = ceilings.gpu_rates(device, dtype)
    if architecture(device) == onchip.TARGET:
        known = roofline.H100
        rates = dataclasses.replace(rates, cache=known.cache, operands=known.operands)
    header = {
        **environment.describe(device),
        "backend": backends.resolve("auto", device, dtype),
        "dtype": options.dtype,
        "copy_bytes_per_second": rates.bandwidth,
        "product_operations_per_second": rates.flops,
    }
    settings = Settings(device, dtype, options.seconds, rates)
    rows = write_table(options.table, TABLES[options.table](settings), header, rates, options.out)
    ours_wrong = any(f"{key}: " in row["status"] for row in rows for key in (OURS, OURS_PATCHES))
    return 1 if ours_wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
