"""Parameters and multiply-adds of MobileViTv2, beside the figures of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import models
from sep_attn import patch


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The counter knows scaled_dot_product_attention by its names on GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


@dataclass(frozen=True)
class Published:
    """A row of the paper: million parameters and, as it calls them, GFLOPs at 256 x 256.

    ``zoo_parameters`` are the million parameters in the authors' list of trained models
    (``apple/ml-cvnets``, ``docs/source/en/general/README-model-zoo.md``).
    """

    multiplier: float
    parameters: float
    gflops: float
    zoo_parameters: float

    @property
    def model(self) -> str:
        """timm's name."""
        return f"mobilevitv2_{round(self.multiplier * 100):03d}"


PUBLISHED = (
    Published(0.5, 1.4, 0.5, 1.4),
    Published(0.75, 2.9, 1.0, 2.9),
    Published(1.0, 4.9, 1.8, 4.9),
    Published(1.25, 7.5, 2.8, 7.5),
    Published(1.5, 10.6, 4.0, 10.6),
    Published(1.75, 14.3, 5.5, 14.3),
    Published(2.0, 18.5, 7.5, 18.4),
)


@torch.no_grad()
def multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """The multiply-adds of a call, in matrix products and convolutions.

    ``FlopCounterMode`` counts two FLOPs for each; pointwise work, sums, norms and softmax count as
    nothing there.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def measure_sizes(published: Published, image_size: int = models.IMAGE_SIZE) -> dict[str, Any]:
    """One row: what timm's model has, before and after patching."""
    model = models.timm_mobilevitv2(published.model)
    image = torch.zeros(1, 3, image_size, image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = multiply_adds(model, image)
    patched_layers = patch(model)
    return {
        "model": published.model,
        "width": f"x{published.multiplier:g}",
        "paper_parameters_m": published.parameters,
        "zoo_parameters_m": published.zoo_parameters,
        "parameters_m": parameters / 1e6,
        "paper_gflops": published.gflops,
        "gmacs": before / 1e9,
        "patched_gmacs": multiply_adds(model, image) / 1e9,
        "gflops_two_a_multiply_add": 2 * before / 1e9,
        "patched_layers": patched_layers,
        "parameters_agree": round(parameters / 1e6, 1) == published.parameters,
        "gmacs_agree": round(before / 1e9, 1) == published.gflops,
    }
