"""The one list of contenders and workloads that every benchmark draws from.

A contender is a layer of one of two families, separable attention or multi-head attention. Each
family has one set of weights and one float64 oracle, so contenders of a family compute the same
function and each is held to it before it is timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, models
from sep_attn import SeparableAttention, reference

HEAD_DIM = 64  # as in vision transformers
SAMPLED_TOKENS = 64  # output tokens of an O(N^2) layer that are compared with its oracle


@dataclass(frozen=True)
class Weights:
    """The two projections that a layer of either family has."""

    in_weight: Tensor  # [1 + 2D, D] or [3D, D]
    in_bias: Tensor
    out_weight: Tensor  # [D, D]
    out_bias: Tensor

    @property
    def dim(self) -> int:
        return self.out_weight.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.in_weight, self.in_bias, self.out_weight, self.out_bias

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Weights:
        return Weights(*(tensor.to(device, dtype) for tensor in self.tensors()))


@dataclass(frozen=True)
class Family:
    """Layers that compute one function, whose cost grows as ``tokens ** exponent``."""

    name: str
    exponent: int
    in_rows: Callable[[int], int]
    oracle: Callable[[Weights, Tensor, Tensor], Tensor]  # (weights, x, queries) -> [B, Q, D]

    def weights(self, dim: int, seed: int = 0) -> Weights:
        """Weights as ``nn.Linear`` draws them, in float64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return (2 * uniform - 1) * dim**-0.5

        rows = self.in_rows(dim)
        return Weights(draw(rows, dim), draw(rows), draw(dim, dim), draw(dim))


def _separable_oracle(weights: Weights, x: Tensor, queries: Tensor) -> Tensor:
    return reference.separable_attention(x, *weights.tensors())[:, queries]


def _attention_oracle(weights: Weights, x: Tensor, queries: Tensor) -> Tensor:
    in_weight, in_bias, out_weight, out_bias = weights.tensors()
    q, k, v = F.linear(x, in_weight, in_bias).chunk(3, dim=-1)
    q, k, v = (_split_heads(part) for part in (q[:, queries], k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    attended = scores.softmax(-1) @ v
    return F.linear(attended.transpose(1, 2).flatten(2), out_weight, out_bias)


def _split_heads(x: Tensor) -> Tensor:
    """[B, N, D] -> [B, heads, N, head_dim]"""
    return x.unflatten(-1, (num_heads(x.shape[-1]), -1)).transpose(1, 2)


def num_heads(dim: int) -> int:
    """Heads of ``HEAD_DIM`` channels, or one head where the width does not divide into them."""
    return dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1


SEPARABLE = Family("separable attention", 1, lambda dim: 1 + 2 * dim, _separable_oracle)
ATTENTION = Family("multi-head attention", 2, lambda dim: 3 * dim, _attention_oracle)


class LiteralSeparableAttention(nn.Module):
    """Equation 3 of the paper as one writes it in PyTorch, for ``[B, N, D]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(dim, 1 + 2 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        scores, keys, values = self.qkv_proj(x).split([1, dim, dim], dim=-1)
        context = (scores.softmax(dim=1) * keys).sum(dim=1, keepdim=True)
        return self.out_proj(F.relu(values) * context)


class ScaledDotProductAttention(nn.Module):
    """The attention block of a vision transformer on ``F.scaled_dot_product_attention``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class SelfMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence to itself, weights not asked for."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads(dim), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _with_weights(module: nn.Module, weights: Weights) -> nn.Module:
    """Sets the parameters of a layer, which every contender keeps in the order of ``Weights``."""
    module = module.to(weights.in_weight.device, weights.in_weight.dtype)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights.tensors(), strict=True):
            parameter.copy_(value.view_as(parameter))
    return module


def _build_timm_compiled(weights: Weights) -> nn.Module:
    """timm's module, compiled for the one shape that it meets."""
    module = _with_weights(models.timm_attention(weights.dim), weights)
    module.compile(dynamic=False)
    return module


def _build_compiled(weights: Weights) -> nn.Module:
    module = _with_weights(LiteralSeparableAttention(weights.dim), weights)
    module.compile(dynamic=True)  # one compilation serves every number of tokens
    return module


def _build_max_autotune(layer: Callable[[int], nn.Module], weights: Weights) -> nn.Module:
    module = _with_weights(layer(weights.dim), weights)
    module.compile(mode="max-autotune")
    return module


@dataclass(frozen=True)
class Layout:
    """How a layer takes the tokens ``[S, N, D]`` of S slices, and the way back."""

    label: str
    from_tokens: Callable[[Tensor], Tensor]
    to_tokens: Callable[[Tensor], Tensor]


TOKENS = Layout("[B, N, D]", lambda x: x, lambda x: x)
PATCHES = Layout(  # the slices of one image: [1, D, S, N]
    "[B, D, P, N]",
    lambda x: x.permute(2, 0, 1).unsqueeze(0).contiguous(),
    lambda x: x.squeeze(0).permute(1, 2, 0),
)


def patches_layout(patches: int) -> Layout:
    """``[B, D, P, N]`` of images with ``patches`` slices each, ``[B P, N, D]`` elsewhere."""
    return Layout(
        "[B, D, P, N]",
        lambda x: x.unflatten(0, (-1, patches)).permute(0, 3, 1, 2).contiguous(),
        lambda x: x.permute(0, 2, 3, 1).flatten(0, 1),
    )


def image_layout(tokens: int, patch_size: tuple[int, int]) -> Layout:
    """One image ``[1, D, H, W]`` whose patches make the slices, as near to a square as N allows."""
    patch_h, patch_w = patch_size
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)

    def from_tokens(x: Tensor) -> Tensor:
        grid = x.view(patch_h, patch_w, rows, tokens // rows, x.shape[-1])
        return grid.permute(4, 2, 0, 3, 1).flatten(3, 4).flatten(1, 2).unsqueeze(0).contiguous()

    def to_tokens(x: Tensor) -> Tensor:
        grid = x.squeeze(0).unflatten(2, (-1, patch_w)).unflatten(1, (-1, patch_h))
        return grid.permute(2, 4, 1, 3, 0).flatten(2, 3).flatten(0, 1)

    return Layout("[B, D, H, W]", from_tokens, to_tokens)


@dataclass(frozen=True)
class Contender:
    """A layer to measure.

    ``build`` gives a module with the parameters ``Weights``, on their device and in their dtype.
    ``scores_in_memory`` names the devices where its forward stores the N x N scores of each head.
    """

    key: str
    label: str
    family: Family
    color: str
    marker: str
    build: Callable[[Weights], nn.Module]
    layout: Layout = TOKENS
    scores_in_memory: tuple[str, ...] = ()

    def peak_bytes(self, batch: int, tokens: int, dim: int, device: str, itemsize: int) -> int:
        """An upper estimate of the memory of one call, training included."""
        total = 48 * batch * tokens * dim * itemsize
        if device in self.scores_in_memory:
            total += 2 * batch * num_heads(dim) * tokens * tokens * itemsize
        return total


CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender(
            "multihead_attention",
            "nn.MultiheadAttention",
            ATTENTION,
            "#D55E00",
            "v",
            lambda weights: _with_weights(SelfMultiheadAttention(weights.dim), weights),
            scores_in_memory=("cpu",),
        ),
        Contender(
            "sdpa_block",
            "scaled_dot_product_attention block",
            ATTENTION,
            "#E69F00",
            "^",
            lambda weights: _with_weights(ScaledDotProductAttention(weights.dim), weights),
        ),
        Contender(
            "literal_eager",
            "separable, eager PyTorch",
            SEPARABLE,
            "#56B4E9",
            "s",
            lambda weights: _with_weights(LiteralSeparableAttention(weights.dim), weights),
        ),
        Contender(
            "literal_compiled",
            "separable, torch.compile",
            SEPARABLE,
            "#CC79A7",
            "D",
            _build_compiled,
        ),
        Contender(
            "timm_eager",
            "timm LinearSelfAttention",
            SEPARABLE,
            "#999999",
            "P",
            lambda weights: _with_weights(models.timm_attention(weights.dim), weights),
            layout=PATCHES,
        ),
        Contender(
            "timm_compiled",
            "timm LinearSelfAttention, torch.compile",
            SEPARABLE,
            "#CC79A7",
            "X",
            _build_timm_compiled,
            layout=PATCHES,
        ),
        Contender(
            "timm_max_autotune",
            'timm, torch.compile(mode="max-autotune")',
            SEPARABLE,
            "#444444",
            "D",
            partial(_build_max_autotune, models.timm_attention),
            layout=PATCHES,
        ),
        Contender(
            "sep_attn",
            "sep_attn.SeparableAttention",
            SEPARABLE,
            "#009E73",
            "o",
            lambda weights: _with_weights(SeparableAttention(weights.dim), weights),
        ),
        Contender(
            "sep_attn_patches",
            "sep_attn.SeparableAttention [B, D, P, N]",
            SEPARABLE,
            "#004D38",
            "o",
            lambda weights: _with_weights(SeparableAttention(weights.dim), weights),
            layout=PATCHES,
        ),
        Contender(
            "sep_attn_max_autotune",
            'sep_attn [B, D, P, N], torch.compile(mode="max-autotune")',
            SEPARABLE,
            "#002B20",
            "o",
            partial(_build_max_autotune, SeparableAttention),
            layout=PATCHES,
        ),
    )
}
OURS = "sep_attn"
TOKEN_SWEEP = (
    "multihead_attention",
    "sdpa_block",
    "literal_eager",
    "literal_compiled",
    "sep_attn",
)

MODES = ("forward", "training")  # training: forward and backward, to the input and all weights
SWEEP_DIM = 128
SWEEP_TOKENS = {
    "cpu": tuple(2**power for power in range(6, 17)),  # 64 to 65,536
    "cuda": tuple(2**power for power in range(6, 19)),  # 64 to 262,144
}


@dataclass(frozen=True)
class LayerShape:
    """Slices of tokens: ``[slices, N, D]``, ``[1, D, slices, N]`` or one image of patches."""

    slices: int
    tokens: int
    dim: int

    @property
    def patch_size(self) -> tuple[int, int]:
        """The patch that gives so many slices of one image: 2 x 2 for 4, as in MobileViTv2."""
        side = math.isqrt(self.slices)
        return (side, side) if side * side == self.slices else (self.slices, 1)

    def __str__(self) -> str:
        return f"{self.slices}x{self.tokens}x{self.dim}"


LAYER_SHAPES = (
    LayerShape(4, 16, 256),  # mobilevitv2_100, stage 5
    LayerShape(4, 64, 144),
    LayerShape(4, 64, 192),  # mobilevitv2_100, stage 4
    LayerShape(4, 256, 64),  # mobilevitv2_050, stage 3
    LayerShape(4, 256, 128),  # mobilevitv2_100, stage 3
    LayerShape(1, 196, 384),  # vision transformers, small and base
    LayerShape(1, 197, 768),
    LayerShape(1, 1024, 96),
    LayerShape(1, 4096, 128),
    LayerShape(1, 16384, 128),
    LayerShape(1, 4096, 512),
)

LARGE = 64 * 2**20  # values of a tensor that keeps a GPU busy and outgrows its caches


def _large(tokens: int, dim: int) -> LayerShape:
    """As many slices as make ``LARGE`` values or more."""
    return LayerShape(-(-LARGE // (tokens * dim)), tokens, dim)


# Measured on a GPU: slices that a program can do whole, slices that it cannot.
SHORT_SLICES = (
    *(_large(256, dim) for dim in (64, 128, 192, 256, 384, 512)),
    _large(16, 256),
    _large(64, 192),
    _large(1024, 128),
    _large(1024, 512),
)
LONG_SLICES = (
    *(_large(65_536, dim) for dim in (64, 128, 256, 512)),
    *(_large(2**20, dim) for dim in (64, 128, 256, 512)),
)
# The nine layers of mobilevitv2_100 at 256 x 256 pixels and batch 256, in four patches each.
MOBILEVITV2_BATCH, MOBILEVITV2_PATCHES = 256, 4
MOBILEVITV2_LAYERS = (
    *[LayerShape(MOBILEVITV2_BATCH * MOBILEVITV2_PATCHES, 256, 128)] * 2,  # stage 3
    *[LayerShape(MOBILEVITV2_BATCH * MOBILEVITV2_PATCHES, 64, 192)] * 4,  # stage 4
    *[LayerShape(MOBILEVITV2_BATCH * MOBILEVITV2_PATCHES, 16, 256)] * 3,  # stage 5
)


def image_contender(shape: LayerShape) -> Contender:
    """sep_attn on ``[1, D, H, W]``, where the layer cuts the patches itself."""
    patch_size = shape.patch_size

    def build(weights: Weights) -> nn.Module:
        return _with_weights(SeparableAttention(weights.dim, patch_size=patch_size), weights)

    return dataclasses.replace(
        CONTENDERS["sep_attn_patches"],
        key="sep_attn_image",
        label="sep_attn.SeparableAttention [B, D, H, W]",
        build=build,
        layout=image_layout(shape.tokens, patch_size),
    )


def draw_tokens(
    batch: int, tokens: int, dim: int, device: torch.device | str, dtype: torch.dtype, seed: int = 1
) -> Tensor:
    """Standard normal ``[batch, tokens, dim]``, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator).to(device, dtype)


def checked_tokens(family: Family, tokens: int, device: torch.device | str) -> Tensor:
    """The output tokens that are compared: all where the oracle costs O(N), else a sample, evenly
    spread with the first and the last in it."""
    count = tokens if family.exponent == 1 else min(tokens, SAMPLED_TOKENS)
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64).round().long().to(device)


def expected_results(family: Family, weights: Weights, x: Tensor, *, mode: str) -> list[Tensor]:
    """What the family's float64 oracle gives; see :func:`layer_results` for what is compared.

    Args:
        family: whose oracle.
        weights: of any dtype; the oracle computes with their values in float64.
        x: ``[B, N, D]``.
        mode: one of ``MODES``.
    """
    dtype = x.dtype
    weights, x = weights.to(x.device, torch.float64), x.double()
    queries = checked_tokens(family, x.shape[1], x.device)
    if mode == "forward":
        with torch.no_grad():
            return [family.oracle(weights, x, queries)]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights.tensors())]
    out = family.oracle(Weights(*leaves[1:]), leaves[0], queries)
    gradient = _output_gradient(out, dtype).double()
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _output_gradient(out: Tensor, dtype: torch.dtype) -> Tensor:
    batch, queries, dim = out.shape
    return draw_tokens(batch, queries, dim, out.device, dtype, seed=2)


def layer_results(contender: Contender, module: nn.Module, x: Tensor, *, mode: str) -> list[Tensor]:
    """Runs a contender once and returns what is compared with the oracle.

    Args:
        contender, module: the contender and what its ``build`` gave.
        x: ``[B, N, D]`` on the module's device.
        mode: one of ``MODES``.

    Returns:
        The output at ``checked_tokens``, and for "training" also the gradients of the input and
        of the four parameters, of an output gradient that is zero at all other tokens: so an
        oracle of O(N) cost checks a layer of O(N^2).
    """
    queries = checked_tokens(contender.family, x.shape[1], x.device)
    if mode == "forward":
        with torch.no_grad():
            return [contender.layout.to_tokens(module(contender.layout.from_tokens(x)))[:, queries]]
    x = contender.layout.from_tokens(x).detach().requires_grad_()
    out = module(x)
    tokens = contender.layout.to_tokens(out)
    gradient = torch.zeros_like(tokens)
    gradient[:, queries] = _output_gradient(tokens[:, queries], tokens.dtype)
    # In the layer's own layout, as the timed step has it: kernels differ by layout.
    gradient = contender.layout.from_tokens(gradient)
    grad_x, *grads = torch.autograd.grad(out, [x, *module.parameters()], gradient)
    flat = [grad.flatten(1) if grad.dim() == 4 else grad for grad in grads]
    return [tokens[:, queries].detach(), contender.layout.to_tokens(grad_x), *flat]


def training_step(
    module: nn.Module,
) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """Forward and backward: from a layer's input and the gradient of its output to the gradients
    of the input and of all weights.

    Args:
        module: a layer in training mode. Its weights are looked up once, as an optimizer does.
    """
    parameters = list(module.parameters())

    def step(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        x, gradient = inputs
        return torch.autograd.grad(module(x), [x, *parameters], gradient)

    return step


def verify(
    contender: Contender,
    module: nn.Module,
    x: Tensor,
    expected: Sequence[Tensor],
    *,
    mode: str,
    plain: Sequence[Tensor] | None = None,
) -> float:
    """Runs a contender once and compares it with its oracle.

    Returns:
        The largest relative error.

    Raises:
        benchmarks.measure.WrongResultError: it is wrong.
    """
    results = layer_results(contender, module, x, mode=mode)
    return measure.check(contender.label, results, expected, plain)
