"""Cases, the float64 oracle, and the one rule by which a result counts as right."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sep_attn import reference
from sep_attn.layout import default_patch_size, token_shape

FEW_VALUES = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the layer. ``shape`` is that of x; ``memory`` says how it lies in memory."""

    shape: tuple[int, ...]
    patch_size: tuple[int, int] | None = None
    memory: str = "contiguous"
    prev_shape: tuple[int, ...] | None = None
    mask: str | None = None
    dropout_p: float = 0.0
    value_act: str = "relu"
    bias: bool = True
    need_weights: bool = False
    grad: str = "dense"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}")
        return "-".join(parts)

    @property
    def dim(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else self.shape[1]


def lay_out(values: Tensor, memory: str) -> Tensor:
    """The same values, lying in memory as asked."""
    if memory == "contiguous":
        return values.contiguous()
    if memory == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "transposed":  # the last two axes change places
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if memory == "sliced":  # every other element of a larger tensor, in every axis
        larger = values.new_full([2 * size + 1 for size in values.shape], float("nan"))
        view = larger[tuple(slice(1, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if memory == "offset":  # behind other values of the same storage
        return torch.cat([values.new_full([3], float("nan")), values.flatten()])[3:].view_as(values)
    if memory == "interleaved":  # the first two axes change places
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "expanded":  # one image for the whole batch
        return values[:1].expand(values.shape)
    raise ValueError(memory)


def make_mask(kind: str, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    mask = torch.rand(tokens, device=device) < 0.4
    if kind == "all":
        mask[:] = True
    elif kind == "first_image":
        mask[:1] = True
    elif kind == "sliced":  # every other value of a larger mask
        mask = mask.repeat_interleave(2, dim=-1)[..., ::2]
    elif kind == "expanded":  # one mask for the whole batch
        mask = mask[:1].expand(tokens)
    return mask


def inputs_of(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int = 1
) -> dict[str, Tensor]:
    """Random inputs of a case, exactly representable in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    dim = case.dim
    tensors = {
        "x": lay_out(normal(*case.shape), case.memory),
        "qkv_weight": normal(1 + 2 * dim, dim, scale=dim**-0.5),
        "out_weight": normal(dim, dim, scale=dim**-0.5),
    }
    if case.bias:
        tensors["qkv_bias"] = normal(1 + 2 * dim)
        tensors["out_bias"] = normal(dim)
    if case.prev_shape is not None:
        tensors["x_prev"] = lay_out(normal(*case.prev_shape), case.memory)
    return tensors


def run(
    layer: Callable[..., Tensor | tuple[Tensor, Tensor]],
    case: Case,
    inputs: dict[str, Tensor],
    **options: object,
) -> dict[str, Tensor]:
    """Output, weights and every gradient of one call."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    source = leaves.get("x_prev", leaves["x"])
    torch.manual_seed(2)
    mask = None
    if case.mask is not None:
        mask = make_mask(case.mask, token_shape(source), source.device)
    result = layer(
        leaves["x"],
        leaves["qkv_weight"],
        leaves.get("qkv_bias"),
        leaves["out_weight"],
        leaves.get("out_bias"),
        x_prev=leaves.get("x_prev"),
        key_padding_mask=mask,
        dropout_p=case.dropout_p,
        value_act=case.value_act,
        patch_size=case.patch_size,
        need_weights=case.need_weights,
        **options,
    )
    out, weights = result if isinstance(result, tuple) else (result, None)
    results = {"out": out.detach()}
    generator = torch.Generator().manual_seed(3)

    def direction(value: Tensor) -> Tensor:
        random = torch.randn(value.shape, generator=generator)
        exact = random.to(torch.bfloat16).to(torch.float16)  # the same numbers in every dtype
        return exact.to(value.device, value.dtype)

    if case.grad == "sum":  # stride 0
        loss = out.sum()
    else:
        loss = (
            out * lay_out(direction(out), case.grad if case.grad != "dense" else "contiguous")
        ).sum()
    if weights is not None:
        results["weights"] = weights.detach()
        loss = loss + (weights * direction(weights)).sum()
    # Without a bias or with everything masked a leaf may stay unused; its gradient is then zero.
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def distance(result: Tensor, oracle: Tensor) -> float:
    """How far a result lies from the oracle, in units of the oracle where that is above 1.

    The largest difference counts. In half precision, where the largest of a few values is a matter
    of luck with their last rounding, the root mean square counts for fewer than FEW_VALUES.
    """
    if oracle.numel() == 0:
        return 0.0
    difference = result.double() - oracle
    in_half = result.dtype in (torch.float16, torch.bfloat16)
    if in_half and oracle.numel() < FEW_VALUES:
        scale = max(1.0, oracle.square().mean().sqrt().item())
        return difference.square().mean().sqrt().item() / scale
    return difference.abs().max().item() / max(1.0, oracle.abs().max().item())


def assert_as_good_as_plain(
    result: dict[str, Tensor], plain: dict[str, Tensor], oracle: dict[str, Tensor]
) -> None:
    """At most twice as far from the float64 oracle as plain PyTorch in the same dtype, + 1e-5."""
    assert result.keys() == plain.keys() == oracle.keys()
    for name, expected in oracle.items():
        assert result[name].shape == expected.shape, name
        assert result[name].dtype == plain[name].dtype, name
        error, allowed = distance(result[name], expected), distance(plain[name], expected)
        assert error <= 2.0 * allowed + 1e-5, f"{name}: {error:.3g} against plain {allowed:.3g}"


def drawn_as(
    backend: object, patch_h: int = 1, patch_w: int = 1
) -> contextlib.AbstractContextManager[object]:
    """Within it the reference draws its dropout as the fused layer of a backend does."""
    if backend != "triton":
        return contextlib.nullcontext()
    from dropout import drawn_by_triton  # needs Triton

    return drawn_by_triton(patch_h, patch_w)


def check_layer(
    layer: Callable[..., Tensor | tuple[Tensor, Tensor]],
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    **options: object,
) -> dict[str, Tensor]:
    """Runs ``layer`` on a case and holds it against the oracle; returns its results."""
    inputs = inputs_of(case, dtype, device)
    result = run(layer, case, inputs, **options)
    in_float64 = {name: value.double() for name, value in inputs.items()}
    patch_size = case.patch_size or default_patch_size(inputs["x"])
    with drawn_as("native" if dtype == torch.float64 else options["backend"], *patch_size):
        plain = run(reference.separable_attention, case, inputs)
        oracle = run(reference.separable_attention, case, in_float64)
    assert_as_good_as_plain(result, plain, oracle)
    return result
