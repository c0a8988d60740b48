"""One shape, dtype and pass: its inputs, its oracle, and the layers that may be timed on it."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks import ceilings, measure, registry
from benchmarks.registry import CONTENDERS, Contender, LayerShape

TIMM, COMPILED, FLOOR = "timm_eager", "timm_compiled", "floor"
LAYOUTS = {
    "sep_attn": "[B, N, D]",
    "sep_attn_patches": "[B, D, P, N]",
    "sep_attn_image": "[B, D, H, W]",
}


def contender(name: str, shape: LayerShape) -> Contender:
    """The contender of that name for a shape: an image's patches depend on the number of slices."""
    return registry.image_contender(shape) if name == "sep_attn_image" else CONTENDERS[name]


class Workload:
    """What one line of a table computes; inputs and oracle are made when first needed.

    Args:
        shape: slices, tokens and channels.
        dtype: of inputs and weights.
        mode: one of ``benchmarks.registry.MODES``.
    """

    def __init__(
        self, shape: LayerShape, *, dtype: torch.dtype = torch.float32, mode: str = "forward"
    ) -> None:
        self.shape, self.dtype, self.mode = shape, dtype, mode

    @property
    def operations(self) -> int:
        """Of the products that remain in the pooled form, a multiply-add counting as two."""
        shape = self.shape
        return ceilings.PRODUCTS[self.mode] * 2 * shape.slices * shape.tokens * shape.dim**2

    @cached_property
    def weights(self) -> registry.Weights:
        return registry.SEPARABLE.weights(self.shape.dim).to("cpu", self.dtype)

    @cached_property
    def x(self) -> Tensor:
        """``[slices, N, D]``"""
        shape = self.shape
        return registry.draw_tokens(shape.slices, shape.tokens, shape.dim, "cpu", self.dtype)

    @cached_property
    def expected(self) -> list[Tensor]:
        return registry.expected_results(registry.SEPARABLE, self.weights, self.x, mode=self.mode)

    @cached_property
    def plain(self) -> list[Tensor]:
        """What plain PyTorch gives in this dtype: the package's layer may be twice as far off."""
        literal = CONTENDERS["literal_eager"]
        return registry.layer_results(literal, literal.build(self.weights), self.x, mode=self.mode)

    def build(self, name: str) -> nn.Module:
        """The layer, in training mode where gradients are wanted."""
        module = contender(name, self.shape).build(self.weights)
        return module.train(self.mode == "training")

    def verify(self, name: str, module: nn.Module) -> float:
        """The layer's error against float64.

        Raises:
            benchmarks.measure.WrongResultError: it is wrong.
        """
        plain = self.plain if name in LAYOUTS else None
        layer = contender(name, self.shape)
        return registry.verify(layer, module, self.x, self.expected, mode=self.mode, plain=plain)

    def call(self, name: str, module: nn.Module) -> measure.Call:
        """One call of the layer, or one training step, on inputs in its own layout."""
        x = contender(name, self.shape).layout.from_tokens(self.x).detach()
        if self.mode == "forward":
            return partial(module, x)
        pair = (x.clone().requires_grad_(), torch.randn_like(x))
        return partial(registry.training_step(module), pair)

    def checked_call(self, name: str) -> measure.Call:
        """Builds a layer, holds it to the oracle, and gives the call to time.

        Raises:
            benchmarks.measure.WrongResultError: it is wrong.
        """
        module = self.build(name)
        self.verify(name, module)
        return self.call(name, module)

    def floor(self) -> measure.Call:
        """The layer's products by ``torch.mm`` and nothing else."""
        return ceilings.cpu_products(self.x, mode=self.mode)

    def gradients(self) -> torch.set_grad_enabled:
        """The context to time in: gradients in training, none in the forward pass."""
        return torch.set_grad_enabled(self.mode == "training")
