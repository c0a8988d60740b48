"""MobileViTv2 as the encoder of a detector and of a segmentation model, before and after patch.

The paper detects at 320 x 320 (SSDLite) and segments at 512 x 512 (DeepLabv3). There the features
of every stage count, not the logits alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, models, real_model
from sep_attn import patch

Outputs = Callable[[nn.Module, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Task:
    """A model, the size of its images, and the feature maps that it gives."""

    name: str
    label: str
    image_size: int
    build: Callable[[], nn.Module]
    outputs: Outputs


def _feature_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    return list(model(images))


def _hidden_states_and_logits(model: nn.Module, images: Tensor) -> list[Tensor]:
    result = model(images, output_hidden_states=True)
    return [*result.hidden_states, result.logits]


def _timm_encoder() -> nn.Module:
    return models.timm_mobilevitv2("mobilevitv2_100", features_only=True)


def _segmentation() -> nn.Module:
    return models.hugging_face_segmentation(num_labels=21)  # the classes of PASCAL VOC


TASKS = (
    Task("detection", "detection: timm, five feature maps", 320, _timm_encoder, _feature_maps),
    Task("encoder", "segmentation: timm, five feature maps", 512, _timm_encoder, _feature_maps),
    Task(
        "segmentation",
        "segmentation: Hugging Face, five hidden states and DeepLabv3's logits",
        512,
        _segmentation,
        _hidden_states_and_logits,
    ),
)


@torch.no_grad()
def measure_task(task: Task, *, threads: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Compares every feature map with float64, before and after patching, then times both.

    Args:
        task: what to build and on which images.
        threads: how many threads; one row for each.
        seconds: spent on each row.

    Raises:
        benchmarks.measure.WrongResultError: a feature map is wrong; nothing is timed then.
    """
    before = task.build()
    after, oracle = copy.deepcopy(before), copy.deepcopy(before).double()
    patched_layers = patch(after)
    generator = torch.Generator().manual_seed(models.SEED)
    images = torch.rand(1, 3, task.image_size, task.image_size, generator=generator)
    tokens = [x.shape[-1] for x in real_model.capture_attention_inputs(before, images).values()]
    plain, patched = task.outputs(before, images), task.outputs(after, images)
    error = measure.check(
        f"patched model for {task.name}", patched, task.outputs(oracle, images.double()), plain
    )
    difference = max(
        ((mine - theirs).abs().max() / theirs.abs().max()).item()
        for mine, theirs in zip(patched, plain, strict=True)
    )
    rows = []
    for count in threads:
        with measure.threads(count):
            calls = {
                name: functools.partial(task.outputs, model, images)
                for name, model in (("before", before), ("after", after))
            }
            timings = measure.interleaved(calls, seconds=seconds)
        rows.append(
            {
                "task": task.name,
                "label": task.label,
                "image": f"{task.image_size} x {task.image_size}",
                "tokens": ", ".join(str(n) for n in dict.fromkeys(tokens)),
                "maps": len(plain),
                "patched_layers": patched_layers,
                "difference": difference,
                "error": error,
                "threads": count,
                "before_ms": timings["before"].median * 1e3,
                "after_ms": timings["after"].median * 1e3,
                "speed_up": 1 / timings["after"].ratio_to(timings["before"]),
            }
        )
    return rows
