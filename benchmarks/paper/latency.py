"""The paper's Table 1: MobileViT with three attention units, and with this package's.

timm's ``mobilevit_s`` keeps everything but its attention. The paper calls what that exchange gives
MobileViTv2, whose blocks differ in more (no fusion, depthwise convolutions), so ``mobilevitv2_100``
stands beside them, the nearest in width: 128, 192, 256 channels in its three stages against 144,
192, 240.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, models
from benchmarks.paper import sizes, units
from sep_attn import patch

PARTS = {"attention": "nine attention layers", "model": "whole model"}
MODES = ("eager", "compiled")
MULTI_HEAD = "multi_head"
SLOW_ROUND = 2.0  # seconds; from there on nothing is warmed up


@dataclass(frozen=True)
class Contender:
    """A row of the table; ``paper_ms`` is the paper's figure, on a phone, as quoted to us."""

    key: str
    label: str
    paper_ms: float | None


CONTENDERS = (
    Contender(MULTI_HEAD, "mobilevit_s, multi-head (as timm has it)", 9.9),
    Contender("linformer", "mobilevit_s, Linformer, p = 256", 10.2),
    Contender("literal", "mobilevit_s, separable, plain PyTorch", 3.4),
    Contender("sep_attn", "mobilevit_s, separable, sep_attn", None),
    Contender("v2", "mobilevitv2_100, separable (as timm has it)", 3.4),
    Contender("v2_patched", "mobilevitv2_100, sep_attn.patch", None),
)


def build(image_size: int = models.IMAGE_SIZE) -> dict[str, nn.Module]:
    """The contenders' models, weights from a fixed seed; those of one function share them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.SEED)
        multi_head, v2 = units.timm_mobilevit(), models.timm_mobilevitv2()
        inputs = capture(multi_head, torch.zeros(1, 3, image_size, image_size))
        tokens = {name: x.shape[1] for name, x in inputs.items()}
        separable = units.with_separable(multi_head)
        linformer = units.with_linformer(multi_head, tokens)
    patched = copy.deepcopy(v2)
    patch(patched)
    return {
        MULTI_HEAD: multi_head,
        "linformer": linformer,
        "literal": units.with_literal_separable(separable),
        "sep_attn": separable,
        "v2": v2,
        "v2_patched": patched,
    }


@torch.no_grad()
def capture(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each attention layer receives when the model sees the images."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].detach().clone()

    hooks = [
        layer.register_forward_pre_hook(functools.partial(keep, name))
        for name, layer in units.attention_layers(model).items()
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


class AttentionOnly(nn.Module):
    """The attention layers of a model, each on its own input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(units.attention_layers(model).values())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


@dataclass(frozen=True)
class Work:
    """A module, its inputs and how to judge its results."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    expected: list[Tensor]  # float64, of the first and the last entry of the batch

    def check(self, name: str, module: nn.Module) -> float:
        results = module(*self.inputs)
        results = results if isinstance(results, list) else [results]
        # Entries of a batch do not touch one another, in any of the models.
        return measure.check(name, [_ends(result) for result in results], self.expected)


def _ends(x: Tensor) -> Tensor:
    return torch.stack([x[0], x[-1]])


def work(model: nn.Module, part: str, images: Tensor) -> Work:
    """The whole model, or its attention layers on what they receive in it."""
    if part == "model":
        expected = units.oracle(model)(_ends(images).double())
        return Work(model, (images,), [expected])
    inputs = tuple(capture(model, images).values())
    layers = units.attention_layers(copy.deepcopy(model).double()).values()
    expected = [
        units.expected_output(layer, _ends(x).double())
        for layer, x in zip(layers, inputs, strict=True)
    ]
    return Work(AttentionOnly(model), inputs, expected)


class Compiler:
    """Compiles while there is time: a compilation is begun only if the last ones would fit."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.took: dict[str, float] = {}  # seconds of the longest, by part
        self.error: float | None = None  # of the last result

    def compile(self, part: str, name: str, job: Work) -> tuple[Callable[..., Any] | None, str]:
        """A compiled and checked module, or None with the reason."""
        left = self.until - time.perf_counter()
        if left < max(self.took.get(part, 0.0), 1.0):
            return None, "left out: no time was left to compile it"
        start = time.perf_counter()
        compiled = torch.compile(job.module, dynamic=False)
        try:
            self.error = job.check(f"{name}, compiled", compiled)
        except measure.WrongResultError:
            raise
        except Exception as error:  # one failure must not cost the others' figures
            first_line = str(error).strip().partition("\n")[0]
            return None, f"failed: {type(error).__name__}: {first_line}"
        self.took[part] = max(self.took.get(part, 0.0), time.perf_counter() - start)
        return compiled, "timed"


@torch.no_grad()
def measure_case(
    contenders: Mapping[str, nn.Module],
    images: Tensor,
    part: str,
    *,
    threads: int,
    seconds: float,
    compiler: Compiler | None,
) -> list[dict[str, Any]]:
    """Checks, then times all contenders in turns, eager and, while there is time, compiled.

    Raises:
        benchmarks.measure.WrongResultError: one is wrong; nothing is timed then.
    """
    calls: dict[tuple[str, str], measure.Call] = {}
    errors: dict[tuple[str, str], float | None] = {}
    states: dict[tuple[str, str], str] = {}
    torch._dynamo.reset()
    slowest = 0.0
    with measure.threads(threads):
        for key, model in contenders.items():
            job = work(model, part, images)
            start = time.perf_counter()
            errors[key, "eager"] = job.check(f"{key}, {PARTS[part]}", job.module)
            slowest += time.perf_counter() - start
            calls[key, "eager"] = functools.partial(job.module, *job.inputs)
            states[key, "eager"] = "timed"
            if compiler is not None:
                compiled, states[key, "compiled"] = compiler.compile(part, key, job)
                if compiled is not None:
                    calls[key, "compiled"] = functools.partial(compiled, *job.inputs)
                    errors[key, "compiled"] = compiler.error
        slow = slowest * len(calls) / len(contenders) > SLOW_ROUND
        timings = measure.interleaved(
            calls,
            seconds=seconds,
            warmup_seconds=0.0 if slow else 0.05,  # the check has run each once
        )
    rows = []
    for (key, mode), state in states.items():
        timing, baseline = timings.get((key, mode)), timings.get((MULTI_HEAD, mode))
        rows.append(
            {
                "part": part,
                "contender": key,
                "mode": mode,
                "batch": len(images),
                "threads": threads,
                "milliseconds": timing and timing.median * 1e3,
                "lower_quartile": timing and timing.lower_quartile * 1e3,
                "upper_quartile": timing and timing.upper_quartile * 1e3,
                "samples": timing.samples if timing else 0,
                "times_faster_than_multi_head": (
                    1 / timing.ratio_to(baseline) if timing and baseline else None
                ),
                "error": errors.get((key, mode)),
                "status": state,
            }
        )
    return rows


def describe(
    contenders: Mapping[str, nn.Module], image_size: int = models.IMAGE_SIZE
) -> list[dict[str, Any]]:
    """Parameters and multiply-adds of each model and of its attention layers."""
    image = torch.zeros(1, 3, image_size, image_size)
    rows = []
    for contender in CONTENDERS:
        model = contenders[contender.key]
        layers, inputs = AttentionOnly(model), capture(model, image)
        rows.append(
            {
                "contender": contender.key,
                "label": contender.label,
                "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
                "gmacs": sizes.multiply_adds(model, image) / 1e9,
                "attention_gmacs": sizes.multiply_adds(layers, *inputs.values()) / 1e9,
                "tokens": ", ".join(dict.fromkeys(str(_tokens(x)) for x in inputs.values())),
            }
        )
    return rows


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else x.shape[3]


def cases(batches: Sequence[int], threads: Sequence[int]) -> list[tuple[int, int, str]]:
    """Batch, threads and part, the paper's own case (one image, one thread) first."""
    settings = [(batch, count) for batch in batches for count in threads]
    return [(batch, count, part) for batch, count in settings for part in PARTS]
