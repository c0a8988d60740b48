"""Large scores, infinities and NaN in the input: every backend as the reference, both ways."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Case, assert_as_good_as_plain, drawn_as, inputs_of, run
from test_layer import backend_or_skip, device_of
from torch import Tensor

from sep_attn import functional, native, reference
from sep_attn.functional import separable_attention
from sep_attn.layout import default_patch_size

BACKENDS = ["native", "triton"]
CAPABILITIES = native.capabilities() if native.unavailable_reason() is None else []
BAD = [math.nan, math.inf, -math.inf]
CASES = [
    Case((3, 20, 8), need_weights=True),
    Case((2, 8, 3, 20)),
    Case((3, 20, 8), prev_shape=(3, 11, 8)),
    Case((3, 20, 8), mask="random"),
    Case((2, 8, 4, 6), patch_size=(2, 2), dropout_p=0.3),
]
# Where the bad number goes: for a weight, the score, a key, a value.
PLACES = [
    ("x", (1, 5)),
    ("x_prev", (1, 5)),
    ("qkv_weight", (0, 2)),
    ("qkv_weight", (3, 3)),
    ("qkv_weight", (12, 1)),
    ("out_weight", (1, 2)),
    ("qkv_bias", (0,)),
    ("qkv_bias", (4,)),
    ("qkv_bias", (9,)),
    ("out_bias", (2,)),
]


def bad_numbers(backend: str, number: int) -> list[float]:
    """All of them, or one by turns in Triton's interpreter."""
    return BAD if backend == "native" or torch.cuda.is_available() else [BAD[number % 3]]


def assert_same_places(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Finite where the reference is, and of the same value there. Whether an overflow ends as inf
    or as NaN depends on the order of the sums, which the pooled form changes."""
    for name, value in expected.items():
        finite = value.isfinite()
        assert torch.equal(results[name].isfinite(), finite), name
        torch.testing.assert_close(
            results[name][finite], value[finite], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("memory", ["contiguous", "transposed"])
def test_scores_of_ten_thousand(
    memory: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Whole numbers times 1e4 (2**13 in float16): exact in every dtype, the softmax one-hot or a
    tie."""
    device = device_of(backend, device)
    backend_or_skip(backend, device, dtype)
    case = Case((3, 40, 8), memory=memory, need_weights=True)
    inputs = inputs_of(case, dtype, device)
    factor = 2.0**13 if dtype == torch.float16 else 1e4
    inputs["x"][:, :, 0] = torch.randint(-1, 2, (3, 40), device=device).to(dtype)
    inputs["x"][2, :, 0] = -1.0  # a slice of nothing but -1e4
    inputs["qkv_weight"][0] = 0.0
    inputs["qkv_weight"][0, 0] = factor
    inputs["qkv_bias"][0] = 0.0
    results = [
        run(function, case, values)
        for function, values in (
            (lambda *a, **k: separable_attention(*a, backend=backend, **k), inputs),
            (reference.separable_attention, inputs),
            (reference.separable_attention, {name: v.double() for name, v in inputs.items()}),
        )
    ]
    assert all(value.isfinite().all() for value in results[0].values())
    weights = results[2]["weights"]
    assert torch.equal(weights > 0, inputs["x"][:, :, 0] == inputs["x"][:, :, :1].amax(1))
    assert_as_good_as_plain(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}{list(place[1])}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_numbers_spread_as_in_the_reference(
    case: Case, place: tuple[str, tuple[int, ...]], backend: str, device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    if backend == "triton" and device.type == "cpu" and CASES.index(case) != 3:
        pytest.skip("enough for Triton's interpreter, which takes seconds")
    name, index = place
    if name == "x_prev" and case.prev_shape is None:
        pytest.skip("the case has no x_prev")
    for bad in bad_numbers(backend, CASES.index(case) + PLACES.index(place)):
        inputs = inputs_of(case, torch.float32, device)
        inputs[name][index if name != "x" or len(case.shape) == 3 else (1, 3, 2, 5)] = bad
        results = run(separable_attention, case, inputs, backend=backend)
        with drawn_as(backend, *(case.patch_size or default_patch_size(inputs["x"]))):
            expected = run(separable_attention, case, inputs, backend="reference")
        if name == "x_prev":
            # A score of -inf gives the weight 0, and the kernels let no gradient through it, as
            # through that of a masked token; the reference makes NaN of 0 times inf.
            score = inputs["x_prev"][1, 5] @ inputs["qkv_weight"][0]
            if score == -math.inf:
                assert not results["grad_x_prev"][1, 5].any()
                expected["grad_x_prev"][1, 5] = 0.0
        if backend == "triton" and case.mask and place == ("qkv_weight", (0, 2)):
            # The scores are a product of torch's there: 0 times the weight reaches masked tokens.
            expected["grad_x"][:, :, 2] = results["grad_x"][:, :, 2]
        if backend == "triton" and place == ("qkv_weight", (12, 1)):
            # Rows of a tile beyond the tokens hold 0 times the value weight: an infinite one
            # reaches the gradients of every slice that does not fill its tile.
            lost = ~results["grad_x"].isfinite()
            expected["grad_x"][lost] = results["grad_x"][lost]
        assert_same_places(results, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_gradient_spreads_as_in_the_reference(
    case: Case, backend: str, device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    for bad in bad_numbers(backend, CASES.index(case)):
        gradients = []
        for own_backend in (backend, "reference"):
            inputs = inputs_of(case, torch.float32, device)
            leaves = {name: value.requires_grad_() for name, value in inputs.items()}
            out = separable_attention(
                leaves["x"],
                leaves["qkv_weight"],
                leaves["qkv_bias"],
                leaves["out_weight"],
                leaves["out_bias"],
                x_prev=leaves.get("x_prev"),
                patch_size=case.patch_size,
                backend=own_backend,
            )
            direction = torch.ones(out.shape, device=device)
            direction.view(-1)[out.numel() // 2] = bad
            grads = torch.autograd.grad(out, list(leaves.values()), direction)
            gradients.append(dict(zip(leaves, grads, strict=True)))
        assert_same_places(*gradients)


# Slices side by side in a tile, slices of a patch, a slice of several tiles.
HALF_CASES = [
    Case((3, 20, 8), need_weights=True),
    Case((2, 8, 4, 6), patch_size=(2, 2), dropout_p=0.3),
    Case((3, 20, 8), mask="random", prev_shape=(3, 11, 8), need_weights=True),
    Case((2, 150, 8), need_weights=True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_bad_numbers_stay_in_their_slice_where_slices_share_a_product(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    """As in the reference in float32: what overflows in its half precision would be its own."""
    backend_or_skip("triton", device, dtype)
    source = "x" if case.prev_shape is None else "x_prev"
    places = [(source, (1, 5) if len(case.shape) == 3 else (1, 3, 2, 5)), ("qkv_weight", (0, 2))]
    for i, (name, index) in enumerate(places):
        for bad in bad_numbers("triton", HALF_CASES.index(case) + i):
            inputs = inputs_of(case, dtype, device)
            inputs[name][index] = bad
            exact = {key: value.float() for key, value in inputs.items()}
            results = run(separable_attention, case, inputs, backend="triton")
            with drawn_as("triton", *(case.patch_size or default_patch_size(inputs["x"]))):
                expected = run(separable_attention, case, exact, backend="reference")
            for key in {"out", "weights"} & set(expected):
                value = expected[key]
                finite = value.isfinite()
                assert torch.equal(results[key].isfinite(), finite), (key, name, bad)
                torch.testing.assert_close(
                    results[key][finite].float(), value[finite], atol=0.02, rtol=0.02
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_are_summed_where_the_largest_has_nothing(
    dtype: torch.dtype, device: torch.device
) -> None:
    """A token with nearly all of the weight is 0 in a channel where the others are 1: what is left
    of them there are weights of 1e-7, which float16 does not hold, to a percent."""
    backend_or_skip("triton", device, dtype)
    x = torch.zeros(1, 150, 8, dtype=dtype, device=device)
    x[0, 7, 0] = 16.0
    x[0, :, 1] = 1.0
    x[0, 7, 1] = 0.0
    qkv_weight = torch.zeros(17, 8, dtype=dtype, device=device)
    qkv_weight[0, 0] = 1.0  # the scores: 16 and 0
    qkv_weight[1 + 1, 1] = 1024.0  # the key: the sum of the others' weights
    qkv_bias = torch.zeros(17, dtype=dtype, device=device)
    qkv_bias[9:] = 1.0  # the values
    identity = torch.eye(8, dtype=dtype, device=device)
    out = separable_attention(x, qkv_weight, qkv_bias, identity, None, backend="triton")
    expected = 1024 * 149 / (149 + math.exp(16))
    torch.testing.assert_close(
        out[0, :, 1].float(), torch.full((150,), expected, device=device), atol=0.0, rtol=0.01
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "underflow"])
def test_weights_of_zero_take_no_gradient_whatever_comes(
    backend: str, dtype: torch.dtype, masked: bool, device: torch.device
) -> None:
    """The entropy of the weights: p log p has no derivative at 0."""
    backend_or_skip(backend, device, dtype)
    device = device_of(backend, device)
    inputs = inputs_of(Case((3, 20, 8)), dtype, device)
    mask = torch.zeros(3, 20, dtype=torch.bool, device=device)
    mask[:, 15:] = masked
    if not masked:
        inputs["qkv_weight"][0] = 0.0
        inputs["qkv_weight"][0, 0] = 100.0
        inputs["x"][:, :15, 0] = 0.0
        inputs["x"][:, 15:, 0] = -10.0
    gradients = []
    for own_backend in (backend, "reference"):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        _, weights = separable_attention(
            **leaves, key_padding_mask=mask, need_weights=True, backend=own_backend
        )
        assert bool((weights[:, 15:] == 0.0).all())
        entropy = -(weights * weights.log()).where(weights > 0.0, 0.0).sum()
        taken = [leaves["x"], leaves["qkv_weight"]]
        gradients.append(torch.autograd.grad(entropy, taken))
    for own, expected in zip(*gradients, strict=True):
        if masked:
            assert bool(expected.isfinite().all())
            torch.testing.assert_close(own, expected, atol=0.05, rtol=0.05)
        assert bool(own.isfinite().all())


def test_rows_beyond_the_tokens_add_nothing_where_values_overflow(device: torch.device) -> None:
    """In float16 act(b_V) times the context can be infinite where act(v) times it is not."""
    backend_or_skip("triton", device, torch.float16)
    case = Case((1, 17, 16))
    inputs = inputs_of(case, torch.float16, device)
    inputs["x"][:, :, 0] = -1.0
    inputs["qkv_weight"][17:] *= 0.01
    inputs["qkv_weight"][17:, 0] = 300.0
    inputs["qkv_bias"][1:] = 300.0  # of the keys too: the context is near it
    gradients = [
        run(separable_attention, case, {**inputs}, backend=backend)["grad_out_weight"]
        for backend in ("triton", "reference")
    ]
    assert bool(gradients[0].isfinite().all())
    torch.testing.assert_close(*gradients, atol=2.0, rtol=0.02)


# Tokens as rows, on lanes by tokens, on lanes by rows and with a tail; every number of channels is
# ragged, and odd ones leave a pair of channels half empty where products are of pairs.
BFLOAT16_CASES = [
    Case((2, 40, 8)),
    Case((2, 150, 33), prev_shape=(2, 11, 33)),
    Case((2, 9, 4, 40), value_act="identity"),
    Case((1, 34, 3, 50), prev_shape=(1, 34, 3, 7)),
    Case((2, 9, 49), prev_shape=(2, 5, 49)),
    Case((2, 6, 50), memory="offset"),
    Case((1, 21, 65), prev_shape=(1, 8, 65), memory="sliced"),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_bad_numbers_spread_in_bfloat16_as_in_the_reference(case: Case, capability: str) -> None:
    """In the reference in float32: an overflow in its bfloat16 would be one of its own."""
    before = native.capability()
    dim = case.dim
    places = [
        ("x", tuple(size // 2 for size in case.shape)),
        ("x", tuple(size - 1 for size in case.shape)),
        ("qkv_weight", (1 + dim + 2, 3)),
        ("qkv_weight", (2 * dim, dim - 1)),
        ("qkv_bias", (2 * dim,)),
        ("out_weight", (1, 2)),
        ("out_weight", (dim - 1, dim - 1)),
    ]
    try:
        native.set_capability(capability)
        for name, index in places:
            for bad in BAD:
                inputs = inputs_of(case, torch.bfloat16, torch.device("cpu"))
                inputs[name][index] = bad
                results = run(separable_attention, case, inputs, backend="native")
                exact = {key: value.float() for key, value in inputs.items()}
                expected = run(separable_attention, case, exact, backend="reference")
                finite = expected["out"].isfinite()
                assert torch.equal(results["out"].isfinite(), finite), (name, index, bad)
                torch.testing.assert_close(
                    results["out"][finite].float(), expected["out"][finite], atol=0.05, rtol=0.05
                )
    finally:
        native.set_capability(before)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [9, 33, 64, 65])
@pytest.mark.parametrize("shape", [(2, 70), (1, 8), (1, 24), (2, 4, 30), (1, 2, 5)], ids=str)
def test_an_infinity_that_the_activation_takes_away_leaves_no_trace(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, capability: str
) -> None:
    """Every value of the token is relu(-inf) = 0. What fills a kernel's vectors up past the last
    channel must not become NaN (0 times inf) either, nor keep what was in its scratch memory."""
    before = native.capability()

    def inputs_with(channels: int) -> dict[str, Tensor]:
        sizes = (*shape, channels) if len(shape) == 2 else (shape[0], channels, *shape[1:])
        return inputs_of(Case(sizes, prev_shape=sizes), dtype, torch.device("cpu"))

    def layer(inputs: dict[str, Tensor]) -> Tensor:
        names = ["x", "qkv_weight", "qkv_bias", "out_weight", "out_bias"]
        operands = [inputs[name] for name in names]
        return separable_attention(*operands, x_prev=inputs["x_prev"], backend="native")

    inputs, nothing_but_nan = inputs_with(dim), inputs_with(dim + 1)
    nothing_but_nan["x"].fill_(math.nan)
    channels_last = inputs["x"] if len(shape) == 2 else inputs["x"].movedim(1, -1)
    channels_last[0, ..., -1, dim // 2] = math.inf
    inputs["qkv_weight"][1 + dim :, dim // 2] = -1.0
    try:
        native.set_capability(capability)
        with torch.no_grad():
            layer(nothing_but_nan)
            out = layer(inputs)
    finally:
        native.set_capability(before)
    expected = inputs["out_bias"].expand(*shape, dim)[0, ..., -1, :]
    actual = (out if len(shape) == 2 else out.movedim(1, -1))[0, ..., -1, :]
    assert torch.equal(actual, expected)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pool_takes_infinite_scores_as_the_reference_does(
    backend: str, device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    scores = torch.randn(6, 30, device=device)
    scores[1, ::2] = -math.inf  # as if masked
    scores[2] = -math.inf  # nothing left: NaN
    scores[3, 4] = math.inf
    scores[4, 5] = math.nan
    scores[5] *= 1e4
    x = torch.randn(6, 30, 9, device=device)
    results = []
    for own_backend in (backend, "reference"):
        leaves = x.clone().requires_grad_(), scores.clone().requires_grad_()
        out = functional.context_pool(*leaves, backend=own_backend)
        grads = torch.autograd.grad(out.sum(), leaves)
        results.append({"out": out.detach(), "grad_x": grads[0], "grad_scores": grads[1]})
    assert results[1]["out"].isfinite().all(1).tolist() == [True, True, False, False, False, True]
    assert_same_places(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_the_gate_takes_bad_numbers_as_the_reference_does(
    act: str, backend: str, device: torch.device
) -> None:
    device = device_of(backend, device)
    backend_or_skip(backend, device, torch.float32)
    v, context = torch.randn(2, 12, 9, device=device), torch.randn(2, 9, device=device)
    v[0, 1, :3] = torch.tensor(BAD)
    context[1, :3] = torch.tensor(BAD)
    context[:, 3] = 0.0
    v[:, 2, 3] = math.inf  # times 0
    results = []
    for own_backend in (backend, "reference"):
        leaves = v.clone().requires_grad_(), context.clone().requires_grad_()
        y = functional.gate(*leaves, act=act, backend=own_backend)
        grads = torch.autograd.grad(y.sum(), leaves)
        results.append([y.detach(), *grads])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


# The same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 500, 40), need_weights=True),
        Case((2, 40, 4, 100), dropout_p=0.2),
        Case((1, 40, 32, 30), patch_size=(2, 2), memory="channels_last"),
        Case((4, 6, 96), prev_shape=(4, 9, 96), mask="random"),
    ],
    ids=str,
)
def test_the_same_bits_from_run_to_run_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, capability: str
) -> None:
    inputs = inputs_of(case, dtype, torch.device("cpu"))
    threads, before = torch.get_num_threads(), native.capability()
    try:
        native.set_capability(capability)
        for count in (2, 3):
            torch.set_num_threads(count)
            first = run(separable_attention, case, inputs, backend="native")
            for _ in range(2):
                again = run(separable_attention, case, inputs, backend="native")
                assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)
        native.set_capability(before)
