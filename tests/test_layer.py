"""The whole layer on every backend against the float64 oracle, over the options of the API."""

from __future__ import annotations

import os

import pytest
import torch
from oracle import Case, check_layer, inputs_of, run

from sep_attn.backends import unavailable_reason
from sep_attn.functional import separable_attention
from sep_attn.triton_kernels import attention

# Small enough for Triton's interpreter: each option alone, then together; ragged N and D.
OPTIONS = [
    Case((2, 17, 9)),
    Case((1, 1, 8)),
    Case((2, 37, 16), bias=False),
    Case((2, 37, 16), value_act="identity", need_weights=True),
    Case((2, 37, 16), dropout_p=0.3, need_weights=True),
    Case((2, 37, 16), mask="random", need_weights=True),
    Case((2, 37, 16), mask="first_image"),
    Case((2, 37, 16), mask="all", need_weights=True),
    Case((2, 37, 16), prev_shape=(2, 21, 16), mask="random", dropout_p=0.2, need_weights=True),
    Case((2, 24, 4, 16), need_weights=True),
    Case((2, 24, 4, 16), mask="random", dropout_p=0.1),
    Case((2, 24, 4, 16), prev_shape=(2, 24, 4, 9)),
    Case((2, 12, 8, 6), patch_size=(2, 2), need_weights=True),
    Case((2, 12, 8, 6), patch_size=(2, 3), mask="random", dropout_p=0.1),
    Case((2, 12, 8, 6), patch_size=(4, 1), prev_shape=(2, 12, 4, 10)),
    Case((2, 12, 8, 6), patch_size=(2, 2), memory="channels_last"),
    Case((2, 24, 4, 16), memory="channels_last"),
    Case((2, 24, 4, 16), memory="transposed", grad="transposed"),
    Case((2, 12, 8, 6), patch_size=(2, 2), memory="sliced", grad="sliced"),
    Case((2, 37, 16), memory="sliced", grad="sliced"),
    Case((2, 37, 16), memory="transposed", grad="transposed"),
    Case((2, 37, 16), memory="expanded"),
    Case((2, 37, 16), grad="sum"),
    Case((2, 12, 8, 6), patch_size=(2, 2), grad="sum"),
    Case((0, 37, 16), need_weights=True),
    Case((0, 12, 8, 6), patch_size=(2, 2)),
]

# What only a compiled kernel can run in a test's time: users' sizes and tile boundaries.
SIZES = [
    *(Case((2, n, 64)) for n in (1, 16, 49, 64, 196, 197, 256, 576, 1024)),
    *(Case((2, 50, d)) for d in (7, 8, 31, 33, 96, 144, 192, 336, 512, 768)),
    Case((1, 65_537, 24), need_weights=True),
    Case((64, 16, 32)),
    Case((1, 128, 4, 256)),
    Case((1, 192, 4, 64), mask="random"),
    Case((2, 256, 4, 16), dropout_p=0.1),
    Case((1, 96, 32, 32), patch_size=(2, 2)),
    Case((1, 40, 36, 28), patch_size=(2, 2), memory="channels_last"),
    Case((3, 130, 65), prev_shape=(3, 301, 65), mask="first_image"),
]


def backend_or_skip(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = unavailable_reason(backend, device, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter is unreliable in bfloat16")


def device_of(backend: str, device: torch.device) -> torch.device:
    return torch.device("cpu") if backend == "native" else device


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    check_layer(separable_attention, case, dtype, device, backend=backend)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_single_channel(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    check_layer(separable_attention, Case((3, 16, 1)), dtype, device, backend=backend)


@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_every_size(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    check_layer(separable_attention, case, dtype, device, backend=backend)


# One for every number of pieces and stages that the fused backward has, and for every way in which
# the forward's pool reads ahead: channels side by side in memory, tokens, and many channels.
CASES_OF_SEVERAL_TILES = [
    Case((3, 260, 24)),
    Case((3, 260, 40)),
    Case((7, 40, 136)),
    Case((2, 70, 200)),
    Case((1, 136, 2, 260)),
    Case((2, 150, 392)),
]


@pytest.mark.parametrize("case", CASES_OF_SEVERAL_TILES, ids=str)
def test_programs_of_several_tiles(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that reads ahead must not fill what another warp still multiplies. Large calls loop:
    so does this one, with few programs a launch."""
    backend_or_skip("triton", device, torch.float16)
    machine_code = pytest.importorskip("benchmarks.machine_code", reason="only in the repository")
    for name in ("WEIGHT_PROGRAMS", "WEIGHT_WARPS", "SPLIT_PROGRAMS", "SHORT_PROGRAMS"):
        monkeypatch.setattr(attention, name, 2)
    machine_code.forget_plans()
    try:
        check_layer(separable_attention, case, torch.float16, device, backend="triton")
    finally:
        machine_code.forget_plans()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_extreme_scores(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    case = Case((2, 40, 8), need_weights=True)
    inputs = inputs_of(case, torch.float32, device)
    for factor in (0.0, 1e4):
        scaled = inputs | {"qkv_weight": inputs["qkv_weight"].clone()}
        scaled["qkv_weight"][0] *= factor
        result = run(separable_attention, case, scaled, backend=backend)
        oracle = run(
            separable_attention,
            case,
            {name: value.double() for name, value in scaled.items()},
            backend="reference",
        )
        assert all(value.isfinite().all() for value in result.values())
        # A score of 1e4 is known to about 1e-3 in float32, and so is the weight it gives.
        torch.testing.assert_close(
            result["out"].double(), oracle["out"], atol=2e-2 if factor else 1e-5, rtol=0
        )
        torch.testing.assert_close(
            result["weights"].sum(-1), torch.ones(2, device=device), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_slice(bad: float, backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    inputs = inputs_of(Case((3, 20, 8)), torch.float32, device)
    inputs["x"][1, 5] = bad
    out = run(separable_attention, Case((3, 20, 8)), inputs, backend=backend)["out"]
    expected = run(separable_attention, Case((3, 20, 8)), inputs, backend="reference")["out"]
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_nan_at_masked_tokens_does_not_reach_the_context(
    backend: str, device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    inputs = inputs_of(Case((2, 6, 8), prev_shape=(2, 7, 8)), torch.float32, device)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    mask[:, [1, 4]] = True
    poisoned = inputs["x_prev"].masked_fill(mask[..., None], float("nan"))
    outputs = [
        separable_attention(
            inputs["x"],
            inputs["qkv_weight"],
            inputs["qkv_bias"],
            inputs["out_weight"],
            inputs["out_bias"],
            x_prev=x_prev,
            key_padding_mask=mask,
            backend=backend,
        )
        for x_prev in (inputs["x_prev"], poisoned)
    ]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_x_and_x_prev_may_be_views_that_begin_together(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    weights = inputs_of(Case((2, 32, 4, 32)), torch.float32, device)
    whole = weights.pop("x")
    part = whole[..., :16]
    for x, x_prev in ((whole, part), (part, whole)):
        out = separable_attention(x, **weights, x_prev=x_prev, backend=backend)
        apart = separable_attention(x, **weights, x_prev=x_prev.clone(), backend=backend)
        assert torch.equal(out, apart)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_same_bits_from_run_to_run(backend: str, device: torch.device) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    case = Case((2, 300, 24) if backend == "native" else (2, 70, 24), need_weights=True)
    inputs = inputs_of(case, torch.float32, device)
    first = run(separable_attention, case, inputs, backend=backend)
    for _ in range(10 if backend == "native" else 2):
        again = run(separable_attention, case, inputs, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_threads_change_no_bit_of_the_forward() -> None:
    backend_or_skip("native", torch.device("cpu"), torch.float32)
    case = Case((2, 3000, 40), need_weights=True)
    inputs = inputs_of(case, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(separable_attention, case, inputs, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result["out"], results[0]["out"])
        assert torch.equal(result["weights"], results[0]["weights"])
