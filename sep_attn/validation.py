"""The one validator: every public function checks its arguments here, before any allocation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sep_attn.layout import default_patch_size, num_channels, token_shape

ACTIVATIONS = ("relu", "identity")
BACKENDS = ("auto", "native", "triton", "reference")


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; a device that has no autocast, such as meta, counts as off."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_probability(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_patch_size(patch_size: object) -> tuple[int, int] | None:
    """Returns ``patch_size`` as a pair; an int stands for a square."""
    if patch_size is None:
        return None
    pair = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    ):
        raise TypeError(f"patch_size must be None, an int or two ints, got {patch_size!r}")
    if pair[0] < 1 or pair[1] < 1:
        raise ValueError(f"patch_size must be positive, got {patch_size!r}")
    return (pair[0], pair[1])


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_like(name: str, value: Tensor, x: Tensor, *, mixed_dtypes: bool) -> None:
    _check_tensor(name, value)
    if value.device != x.device:
        raise ValueError(
            f"{name} is on {value.device} but x is on {x.device}; move both to one device"
        )
    if not value.is_floating_point() or (value.dtype != x.dtype and not mixed_dtypes):
        raise TypeError(
            f"{name} has dtype {value.dtype} but x has {x.dtype}; use one dtype, or autocast"
        )


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {list(expected)} ({meaning})"
        )


def _check_input(name: str, x: object) -> None:
    _check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(
            f"{name} must be a dense tensor, got a {kind} one; pad it and give a key_padding_mask"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{name} has rank {x.dim()} and shape {list(x.shape)}, expected [B, N, D], "
            "[B, D, P, N], or [B, D, H, W] with patch_size"
        )


def _check_grid(name: str, x: Tensor, patch_size: tuple[int, int] | None) -> tuple[int, int]:
    if x.dim() == 3 and patch_size is not None:
        raise ValueError(
            f"patch_size={patch_size} needs {name} of shape [B, D, H, W], got {list(x.shape)}"
        )
    if x.numel() == 0:  # an empty batch is fine
        if 0 in token_shape(x)[1:]:
            raise ValueError(f"{name} of shape {list(x.shape)} has no tokens")
        if num_channels(x) == 0:
            raise ValueError(f"{name} of shape {list(x.shape)} has no channels")
    if patch_size is None:
        return default_patch_size(x)
    height, width = x.shape[2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(
            f"{name} is {height} x {width}, which is no multiple of patch_size {patch_size}; "
            "resize or pad it first"
        )
    return patch_size


def _check_mask(mask: object, source: Tensor, name: str) -> None:
    _check_tensor("key_padding_mask", mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool (True leaves a token out), got {mask.dtype}; where 1 "
            "leaves out give mask == 1, where 1 keeps, as in Hugging Face, mask == 0"
        )
    if mask.device != source.device:
        raise ValueError(f"key_padding_mask is on {mask.device} but {name} is on {source.device}")
    _check_shape("key_padding_mask", mask, token_shape(source), f"the tokens of {name}")


def check_channels(x: Tensor, embed_dim: int) -> None:
    if num_channels(x) != embed_dim:
        axis = 2 if x.dim() == 3 else 1
        raise ValueError(
            f"x has {num_channels(x)} channels, axis {axis} of its shape {list(x.shape)}; the "
            f"projections are for {embed_dim}"
        )


def check_tokens(
    x: Tensor,
    x_prev: Tensor | None,
    key_padding_mask: Tensor | None,
    patch_size: object,
    *,
    mixed_dtypes: bool,
) -> tuple[int, int]:
    """Checks what :func:`check_separable_attention` checks besides parameters and choices."""
    pair = check_patch_size(patch_size)
    _check_input("x", x)
    patch_h, patch_w = _check_grid("x", x, pair)
    source, source_name = x, "x"
    if x_prev is not None:
        _check_input("x_prev", x_prev)
        _check_like("x_prev", x_prev, x, mixed_dtypes=mixed_dtypes)
        if x_prev.dim() != x.dim():
            raise ValueError(
                f"x_prev has shape {list(x_prev.shape)} but x has {list(x.shape)}; "
                "both need the same layout"
            )
        if x_prev.shape[0] != x.shape[0]:
            raise ValueError(f"x_prev has batch {x_prev.shape[0]} but x has {x.shape[0]}")
        if num_channels(x_prev) != num_channels(x):
            raise ValueError(
                f"x_prev has {num_channels(x_prev)} channels but x has {num_channels(x)}"
            )
        if _check_grid("x_prev", x_prev, pair) != (patch_h, patch_w):
            raise ValueError(
                f"x_prev has shape {list(x_prev.shape)} but x has {list(x.shape)}; "
                "[B, D, P, N] needs the same P in both"
            )
        source, source_name = x_prev, "x_prev"
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, source, source_name)
    return patch_h, patch_w


def check_separable_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    x_prev: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    value_act: str,
    patch_size: object,
    backend: str = "auto",
    mixed_dtypes: bool = False,
) -> tuple[int, int]:
    """Checks the arguments of ``separable_attention``; returns ``(patch_h, patch_w)``.

    Raises:
        TypeError: an argument of the wrong type, or mixed dtypes (allowed with ``mixed_dtypes``,
            which autocast sets).
        ValueError: a shape, device, probability or choice that does not fit; the message states
            what was given and what was expected.
    """
    check_choice("value_act", value_act, ACTIVATIONS)
    check_choice("backend", backend, BACKENDS)
    check_probability("dropout_p", dropout_p)
    patch_h, patch_w = check_tokens(
        x, x_prev, key_padding_mask, patch_size, mixed_dtypes=mixed_dtypes
    )
    dim, dtype, device = num_channels(x), x.dtype, x.device
    for name, value, shape, meaning in (
        ("qkv_weight", qkv_weight, (1 + 2 * dim, dim), "score, key and value rows, x's channels"),
        ("qkv_bias", qkv_bias, (1 + 2 * dim,), "score, keys and values"),
        ("out_weight", out_weight, (dim, dim), "x's channels"),
        ("out_bias", out_bias, (dim,), "x's channels"),
    ):
        if value is None and name.endswith("bias"):
            continue
        if (  # every call comes this way: what fits is let through at once
            isinstance(value, Tensor)
            and value.shape == shape
            and value.dtype == dtype
            and value.device == device
        ):
            continue
        _check_like(name, value, x, mixed_dtypes=mixed_dtypes)
        assert value is not None
        if value.dim() == 2 and value.shape[0] == 1 + 2 * value.shape[1]:  # x that does not fit
            check_channels(x, value.shape[1])
        _check_shape(name, value, shape, meaning)
    return patch_h, patch_w


def check_context_pool(
    x: Tensor, scores: Tensor, key_padding_mask: Tensor | None, backend: str
) -> None:
    """Checks the arguments of ``context_pool``; raises as :func:`check_separable_attention`."""
    check_choice("backend", backend, BACKENDS)
    _check_input("x", x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}, expected [B, N, D]")
    _check_grid("x", x, None)
    _check_like("scores", scores, x, mixed_dtypes=True)
    _check_shape("scores", scores, token_shape(x), "the tokens of x")
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, x, "x")


def check_gate(v: Tensor, context: Tensor, act: str, backend: str) -> None:
    """Checks the arguments of ``gate``; raises as :func:`check_separable_attention`."""
    check_choice("act", act, ACTIVATIONS)
    check_choice("backend", backend, BACKENDS)
    _check_input("v", v)
    if v.dim() != 3:
        raise ValueError(f"v has shape {list(v.shape)}, expected [B, N, D]")
    _check_grid("v", v, None)
    _check_like("context", context, v, mixed_dtypes=True)
    _check_shape(
        "context", context, (v.shape[0], v.shape[2]), "one context of v's channels a slice"
    )
