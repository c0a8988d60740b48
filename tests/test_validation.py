"""Bad input: one error, that says what was given and what was expected, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sep_attn import SeparableAttention, functional

DIM = 8


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": torch.randn(2, 12, DIM),
        "qkv_weight": torch.randn(1 + 2 * DIM, DIM),
        "qkv_bias": torch.randn(1 + 2 * DIM),
        "out_weight": torch.randn(DIM, DIM),
        "out_bias": torch.randn(DIM),
    }
    return given | changes


LAYER_ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rank", {"x": torch.randn(12, DIM)}, ValueError, r"rank 2 .*expected \[B, N, D\]"),
    ("not a tensor", {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ("integers", {"x": torch.ones(2, 12, DIM, dtype=torch.int64)}, TypeError, "torch.int64"),
    ("no tokens", {"x": torch.randn(2, 0, DIM)}, ValueError, "no tokens"),
    ("no channels", {"x": torch.randn(2, 3, 0)}, ValueError, "no channels"),
    (
        "width",
        {"x": torch.randn(2, 12, 9)},
        ValueError,
        "x has 9 channels, axis 2 of its shape .*for 8",
    ),
    ("out_weight", {"out_weight": torch.randn(DIM, 9)}, ValueError, r"expected \[8, 8\]"),
    ("qkv_bias", {"qkv_bias": torch.randn(16)}, ValueError, r"qkv_bias .*expected \[17\]"),
    ("out_bias", {"out_bias": torch.randn(9)}, ValueError, r"out_bias .*expected \[8\]"),
    ("weight is None", {"qkv_weight": None}, TypeError, "qkv_weight must be a torch.Tensor"),
    ("dtype mix", {"x": torch.randn(2, 12, DIM).double()}, TypeError, "torch.float64"),
    ("device mix", {"x": torch.randn(2, 12, DIM, device="meta")}, ValueError, "move both"),
    ("mask shape", {"key_padding_mask": torch.zeros(2, 11) > 0}, ValueError, r"expected \[2, 12\]"),
    ("mask dtype", {"key_padding_mask": torch.zeros(2, 12)}, TypeError, "must be bool"),
    (
        "mask of x_prev",
        {"x_prev": torch.randn(2, 5, DIM), "key_padding_mask": torch.zeros(2, 12) > 0},
        ValueError,
        r"expected \[2, 5\] \(the tokens of x_prev\)",
    ),
    ("x_prev batch", {"x_prev": torch.randn(3, 12, DIM)}, ValueError, "batch 3 but x has 2"),
    ("x_prev width", {"x_prev": torch.randn(2, 12, 9)}, ValueError, "9 channels but x has 8"),
    ("x_prev rank", {"x_prev": torch.randn(2, DIM, 1, 5)}, ValueError, "same layout"),
    ("x_prev dtype", {"x_prev": torch.randn(2, 12, DIM).half()}, TypeError, "torch.float16"),
    ("x_prev tokens", {"x_prev": torch.randn(2, 0, DIM)}, ValueError, "x_prev .*no tokens"),
    (
        "x_prev groups",
        {"x": torch.randn(2, DIM, 4, 6), "x_prev": torch.randn(2, DIM, 3, 6)},
        ValueError,
        "same P",
    ),
    ("patch of tokens", {"patch_size": (2, 2)}, ValueError, r"needs x of shape \[B, D, H, W\]"),
    (
        "patch multiple",
        {"x": torch.randn(2, DIM, 5, 6), "patch_size": (2, 2)},
        ValueError,
        "5 x 6, which is no multiple",
    ),
    ("patch type", {"patch_size": "2"}, TypeError, "patch_size must be"),
    ("patch sign", {"patch_size": (0, 2)}, ValueError, "must be positive"),
    ("dropout of 1", {"dropout_p": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
    ("dropout below 0", {"dropout_p": -0.1}, ValueError, r"in \[0, 1\), got -0.1"),
    ("dropout nan", {"dropout_p": float("nan")}, ValueError, "got nan"),
    ("activation", {"value_act": "gelu"}, ValueError, "'relu', 'identity', got 'gelu'"),
    ("backend", {"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
]


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
@pytest.mark.parametrize(
    "changes, error, message",
    [case[1:] for case in LAYER_ERRORS],
    ids=[case[0] for case in LAYER_ERRORS],
)
def test_layer_errors(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        functional.separable_attention(**(arguments(backend=backend) | changes))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: functional.context_pool(torch.randn(2, 3, 4, 5), torch.randn(2, 3)),
            ValueError,
            r"expected \[B, N, D\]",
        ),
        (
            lambda: functional.context_pool(torch.randn(2, 3, 4), torch.randn(2, 4)),
            ValueError,
            r"scores .*expected \[2, 3\]",
        ),
        (
            lambda: functional.context_pool(torch.randn(2, 3, 4), torch.ones(2, 3).long()),
            TypeError,
            "torch.int64",
        ),
        (
            lambda: functional.gate(torch.randn(2, 3, 4), torch.randn(2, 3)),
            ValueError,
            r"context .*expected \[2, 4\]",
        ),
        (
            lambda: functional.gate(torch.randn(2, 3, 4), torch.randn(2, 4), act="silu"),
            ValueError,
            "got 'silu'",
        ),
        (
            lambda: functional.gate(torch.randn(3, 4), torch.randn(2, 4)),
            ValueError,
            "rank 2",
        ),
    ],
)
def test_pool_and_gate_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"embed_dim": 0}, ValueError, "must be positive"),
        ({"embed_dim": 8.0}, TypeError, "must be an int, got float"),
        ({"embed_dim": True}, TypeError, "must be an int, got bool"),
        ({"attn_drop": 1.0}, ValueError, "attn_drop"),
        ({"proj_drop": -1}, ValueError, "proj_drop"),
        ({"value_act": "gelu"}, ValueError, "got 'gelu'"),
        ({"backend": "fast"}, ValueError, "got 'fast'"),
        ({"patch_size": (2, 2, 2)}, TypeError, "patch_size"),
    ],
)
def test_module_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SeparableAttention(**({"embed_dim": 8} | changes))


def test_no_tensor_under_autocast_is_told_by_name() -> None:
    weights = torch.randn(17, 8), None, torch.randn(8, 8), None
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be"):
        functional.separable_attention([1.0], *weights)  # type: ignore[arg-type]
