"""The oracle itself: held against loops over single tokens, and against its own properties."""

from __future__ import annotations

import pytest
import torch
from oracle import Case, inputs_of, run

from sep_attn import reference


def loop_over_tokens(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Equation 3 for x of shape [B, D, H, W], one token at a time."""
    x = inputs["x"]
    batch, dim, height, width = x.shape
    patch_h, patch_w = case.patch_size or (height, 1)
    weight, bias = inputs["qkv_weight"], inputs["qkv_bias"]
    out = torch.empty_like(x)
    for b in range(batch):
        for group in range(patch_h * patch_w):
            pixels = [
                (y, x_)
                for y in range(height)
                for x_ in range(width)
                if (y % patch_h) * patch_w + x_ % patch_w == group
            ]
            qkv = [weight @ x[b, :, y, x_] + bias for y, x_ in pixels]
            p = torch.stack([token[0] for token in qkv]).softmax(0)
            context = sum(p[n] * qkv[n][1 : 1 + dim] for n in range(len(pixels)))
            for (y, x_), token in zip(pixels, qkv, strict=True):
                gated = token[1 + dim :].relu() * context
                out[b, :, y, x_] = inputs["out_weight"] @ gated + inputs["out_bias"]
    return out


@pytest.mark.parametrize(
    "case",
    [Case((2, 5, 4, 3)), Case((2, 5, 4, 6), patch_size=(2, 3)), Case((1, 3, 6, 2), (3, 1))],
    ids=str,
)
def test_matches_equation_3_token_by_token(case: Case) -> None:
    inputs = inputs_of(case, torch.float64, torch.device("cpu"))
    result = run(reference.separable_attention, case, inputs)["out"]
    torch.testing.assert_close(result, loop_over_tokens(case, inputs))


def test_layouts_agree() -> None:
    tokens = Case((2, 12, 5))
    inputs = inputs_of(tokens, torch.float64, torch.device("cpu"))
    expected = run(reference.separable_attention, tokens, inputs)["out"]
    channel_major = inputs | {"x": inputs["x"].transpose(1, 2).unsqueeze(2)}
    result = run(reference.separable_attention, Case((2, 5, 1, 12)), channel_major)["out"]
    torch.testing.assert_close(result.squeeze(2).transpose(1, 2), expected)


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 3, 9)])
def test_weights_sum_to_one_and_ignore_a_shift(shape: tuple[int, ...]) -> None:
    case = Case(shape, need_weights=True)
    inputs = inputs_of(case, torch.float64, torch.device("cpu"))
    weights = run(reference.separable_attention, case, inputs)["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    shifted = inputs | {"qkv_bias": inputs["qkv_bias"].clone()}
    shifted["qkv_bias"][0] += 7.0
    torch.testing.assert_close(
        run(reference.separable_attention, case, shifted)["weights"], weights
    )


def test_a_fully_masked_slice_gives_the_bias_and_finite_gradients() -> None:
    case = Case((2, 6, 4), mask="first_image", need_weights=True)
    inputs = inputs_of(case, torch.float64, torch.device("cpu"))
    result = run(reference.separable_attention, case, inputs)
    assert (result["weights"][0] == 0).all()
    torch.testing.assert_close(result["out"][0], inputs["out_bias"].expand(6, 4))
    assert all(value.isfinite().all() for value in result.values())


def test_masked_tokens_count_for_nothing() -> None:
    inputs = inputs_of(Case((1, 6, 4), prev_shape=(1, 5, 4)), torch.float64, torch.device("cpu"))
    mask = torch.tensor([[False, True, False, False, True]])

    def call(x_prev: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return reference.separable_attention(
            inputs["x"],
            inputs["qkv_weight"],
            inputs["qkv_bias"],
            inputs["out_weight"],
            inputs["out_bias"],
            x_prev=x_prev,
            key_padding_mask=mask,
        )

    poisoned = inputs["x_prev"].masked_fill(mask[..., None], float("nan"))
    torch.testing.assert_close(call(poisoned, mask), call(inputs["x_prev"][:, [0, 2, 3]], None))


def test_dropout_scale_is_the_same_in_every_dtype_and_keeps_the_mean() -> None:
    x = torch.empty(64, 1000, 1)
    scales = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        scales.append(reference.dropout_scale(x.to(dtype), 0.25).double())
    torch.testing.assert_close(scales[0], scales[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(scales[1], scales[2], atol=0, rtol=0)
    assert set(scales[0].unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(scales[0].mean().item() - 1.0) < 0.01
