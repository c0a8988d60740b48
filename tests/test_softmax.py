"""The kernels' exp: its error in units in the last place, against float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sep_attn import native

# exp is within 2 units in the last place; the sum, its inverse and the product round once each.
UNITS = 4.0

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)
CAPABILITIES = [] if native.unavailable_reason() is not None else native.capabilities()


def second_weight(scores: Tensor) -> Tensor:
    """The weight of the second of two tokens a slice, the first having the score 0."""
    pairs = torch.stack([torch.zeros_like(scores), scores], dim=1)
    x = torch.zeros(len(scores), 2, 1, dtype=scores.dtype)
    weights = torch.ops.sep_attn.context_pool_native(x, pairs, None, None, 1, 1)[2]
    return weights[:, 1]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, lowest", [(torch.float32, -87.0), (torch.float64, -700.0)])
def test_exp_is_within_its_bound(dtype: torch.dtype, lowest: float, capability: str) -> None:
    torch.manual_seed(0)
    used = native.capability()
    scores = (torch.rand(20_000, dtype=torch.float64) * lowest).to(dtype)
    scores[:3] = torch.tensor([0.0, lowest, -1e-6])
    try:
        native.set_capability(capability)
        weights = second_weight(scores)
    finally:
        native.set_capability(used)
    exact = scores.to(torch.float64)
    expected = exact.exp() / (1 + exact.exp())
    spacing = torch.nextafter(weights, weights.new_tensor(torch.inf)) - weights
    # float64's own exp is half a unit away, so the bound is one wider there.
    error = (weights.double() - expected).abs() / spacing.double()
    assert error.max() <= UNITS + (1.0 if dtype == torch.float64 else 0.0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_at_the_ends(dtype: torch.dtype, capability: str) -> None:
    used = native.capability()
    tiny = torch.finfo(dtype).smallest_normal
    scores = torch.tensor([-torch.inf, -1e30, -1e4], dtype=dtype)
    subnormal = torch.tensor([tiny], dtype=torch.float64).log().to(dtype) - 2
    try:
        native.set_capability(capability)
        assert torch.equal(second_weight(scores), torch.zeros(3, dtype=dtype))
        value = second_weight(subnormal)
    finally:
        native.set_capability(used)
    assert 0 < value.item() < tiny
    assert value.double().item() == pytest.approx(subnormal.double().exp().item(), rel=1e-4)
