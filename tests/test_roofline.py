"""The cost model against values counted by hand."""

from __future__ import annotations

import pytest

from benchmarks import onchip, registry, roofline
from benchmarks.ceilings import GpuRates
from benchmarks.registry import LayerShape
from benchmarks.roofline import Work
from sep_attn.triton_kernels.configs import Config

SMALL = LayerShape(2, 3, 8)  # 6 tokens, 48 values
WIDE = LayerShape(1, 2, 1024)


def test_short_slice_reads_x_once() -> None:
    # x and out: 96 values of 2 bytes; three matrices of 64; 17 statistics a slice in float32.
    # Products: 2 x 2 x 6 x 64; scores and pool: 3 of 16 rows, 2 x 6 x 8 each; W_K: 2 x 2 x 64.
    forward = Work("slice_fwd_kernel", 192 + 384 + 2 * 17 * 4, 1536 + 4608 + 256)
    assert roofline.forward_work(SMALL, 2) == [forward]
    # In float32 they are sums.
    assert roofline.forward_work(SMALL, 4)[0].operations == 1536 + 192 + 256
    (training,) = roofline.forward_work(SMALL, 2, keep_weights=True)
    assert training.bytes == forward.bytes + 6 * 4


def test_long_slices_read_x_twice() -> None:
    pool, combine, values = roofline.forward_work(SMALL, 2, path="long")
    assert pool == Work("score_pool_fwd_kernel", 96 + 2 * 11 * 4, 192)
    assert combine == Work("context_combine_kernel", 128 + 2 * 11 * 4 + 2 * 17 * 4, 256)
    assert values == Work("value_gate_output_fwd_kernel", 192 + 256 + 2 * 8 * 4, 1536)


def test_wide_layers_pass_gated_values_through_memory() -> None:
    kernels = roofline.forward_work(WIDE, 2)
    assert [work.kernel for work in kernels[2:]] == ["token_product_kernel"] * 2
    values, matrix = 2 * 1024 * 2, 1024 * 1024 * 2
    assert kernels[2] == Work(
        "token_product_kernel", 2 * values + matrix + 1024 * 4, 2 * 2 * 1024 * 1024
    )
    assert kernels[3].bytes == 2 * values + matrix


@pytest.mark.parametrize(
    "shape, passes", [(LayerShape(64, 256, 128), 6), (LayerShape(4, 256, 1024), 11)]
)
def test_backward_counts_its_passes(shape: LayerShape, passes: int) -> None:
    """Without weights and statistics, whose share falls with the number of tokens."""
    more = LayerShape(1000 * shape.slices, shape.tokens, shape.dim)
    values = 999 * shape.slices * shape.tokens * shape.dim * 2
    work, much = roofline.backward_work(shape, 2), roofline.backward_work(more, 2)
    added = sum(one.bytes for one in much) - sum(one.bytes for one in work)
    assert passes <= added / values <= passes * 1.03
    # Recomputed values, dy, two gradients of weights, dx: five products; the pool adds 8 a value.
    # The context's gradient goes back through W_K, and to it.
    operations = sum(one.operations for one in much) - sum(one.operations for one in work)
    per_token = 10 * shape.dim**2 + 8 * shape.dim
    assert operations == 999 * shape.slices * (shape.tokens * per_token + 4 * shape.dim**2)


def test_fused_backward_by_hand() -> None:
    first, sums, context, source, product, key, key_sums = roofline.backward_work(SMALL, 2)
    # Three tensors of 96 bytes, two matrices, context and its gradient, two sums in float32.
    assert first == Work("value_gate_weights_bwd_kernel", 288 + 256 + 128 + 512, 4 * 768)
    assert sums == Work("sum_parts_kernel", 512 + 256, 128)
    assert context == Work("context_bwd_kernel", 4 * 64 + 128, 256)
    assert source == Work("source_bwd_kernel", 96 + 48 + 64, 192)
    assert product == Work("token_product_kernel", 192 + 128 + 48 + 64, 768 + 192)
    # Two slices' rows of 8 float32.
    assert key == Work("key_weight_bwd_kernel", 128 + 256, 256)
    assert key_sums == Work("sum_parts_kernel", 256 + 128, 64)


def test_a_kernel_takes_the_slower_of_bytes_and_operations() -> None:
    work = Work("any", 100, 1000)
    assert work.seconds(GpuRates(flops=1000, bandwidth=10)) == 10
    assert work.seconds(GpuRates(flops=10, bandwidth=10)) == 100
    seconds = roofline.layer_seconds(SMALL, 2, GpuRates(flops=1e30, bandwidth=1.0), mode="training")
    launches = roofline.layer_work(SMALL, 2, mode="training")
    assert seconds == sum(one.bytes for one in launches)


def test_narrow_products_read_longer_than_they_multiply() -> None:
    """At 128 bytes and 64 x 2048 / 64 operations a cycle an instruction of 64 rows and 16 channels
    breaks even at 64 columns."""
    for columns in (8, 16, 32, 64, 128, 256):
        reads = onchip.operands(64, columns, 16, 4) / 128
        multiplies = 64 * columns * 16 / 2048
        assert (reads > multiplies) == (columns < 64)
        assert onchip.operands(64, columns, 16, 4, rows_in_registers=True) == columns * 16 * 2
    # Two groups of four warps share 128 rows, or the columns of 64 rows, which both then read.
    assert onchip.operands(128, 64, 16, 8) == 2 * onchip.operands(64, 64, 16, 4)
    assert onchip.operands(64, 64, 16, 8) == 2 * onchip.operands(64, 32, 16, 4)


def test_what_tiles_read_again_by_hand() -> None:
    # 256 tokens of 512 channels: two tiles read W_V and W_O, and their program W_K; x is read for
    # the pool and for each half of the values; out is written.
    shape = LayerShape(1, 256, 512)
    values, matrix = 256 * 512 * 2, 512 * 512 * 2
    tile = Config(128, 32, 8, 2)
    short = onchip.whole_tokens(shape, tile, pools=True)
    assert short.cache == 4 * values + (2 * 2 + 1) * matrix
    long = onchip.whole_tokens(shape, tile, pools=False)
    assert long.cache == short.cache - values - matrix
    # Slices of 16 tokens: a program a tile, and values in quarters.
    side_by_side = onchip.whole_tokens(LayerShape(16, 16, 512), tile, pools=True)
    assert side_by_side.cache == 6 * values + (2 * 2 + 2) * matrix
    # Of a tile, 64 rows and 16 channels at a time: rows and 256 columns, twice; then 512 columns.
    assert short.operands == 2 * 2 * 32 * (2 * (64 + 256) + 512) * 16 * 2
    # Columns of 256: both halves read all tokens, each of two tiles reads the weight.
    product = onchip.by_columns(shape, Config(128, 256, 8, 3), products=1)
    assert product.cache == 2 * values + 2 * matrix + values
    both = onchip.by_columns(shape, Config(128, 256, 8, 3), products=2)
    assert both.cache == 2 * (2 * values + 2 * matrix) + 3 * values
    assert both.operands == 2 * product.operands
    assert onchip.weight_grad(shape, Config(64, 128, 8, 3)).cache == 2 * 4 * values
    # Slices of 196 tokens are padded each by itself: two tiles of 128 rows; of 20, to 32 rows.
    assert onchip.tiles_of(LayerShape(3, 196, 64), 128) == 6
    assert onchip.tiles_of(LayerShape(9, 20, 64), 128) == 3
    at_once = onchip.weights_at_once(LayerShape(1, 256, 128), Config(64, 32, 4, 2))
    assert at_once.cache == (2 * 4 + 2) * 256 * 128 * 2
    # 192 channels are three pieces of 64 rows, which two groups of warps read each, and 32 columns;
    # as for the values, of 64 tokens and 192 channels. Four tiles, three blocks, two products each.
    pieces = onchip.weights_at_once(LayerShape(1, 256, 192), Config(64, 64, 8, 3))
    assert pieces.operands == 4 * 3 * 2 * (192 + 3 * 64) * (2 * 64 + 64) * 2


def test_every_launch_with_products_has_its_traffic() -> None:
    rates = GpuRates(flops=1e30, bandwidth=1e30, cache=1.0)
    for shape in (LayerShape(4, 256, 128), LayerShape(4, 256, 768)):
        launches = roofline.layer_work(shape, 2, mode="training")
        for work in launches:
            has_products = work.operations > 2 * shape.slices * shape.tokens * shape.dim**2 / 1.01
            assert (work.on_chip.cache > 0) == has_products, work.kernel
            assert work.seconds(rates) == pytest.approx(work.on_chip.cache, rel=1e-6)
        assert all(work.on_chip == (0, 0) for work in roofline.layer_work(shape, 4, mode="forward"))


def test_floor_of_the_forward_pass() -> None:
    rates = GpuRates(flops=1e6, bandwidth=1e3)
    assert roofline.forward_floor(LayerShape(4, 256, 64), 2, rates) == 2 * 4 * 256 * 64 * 2 / 1e3
    assert roofline.forward_floor(LayerShape(1, 65_536, 64), 2, rates) == 3 * 2**22 * 2 / 1e3
    products = GpuRates(flops=1.0, bandwidth=1e30)
    assert roofline.forward_floor(WIDE, 2, products) == 4 * 2 * 1024**2
    # On an H100 the layer is bound by its products from D = 512 on.
    for dim, bound in ((256, 2 * 2**26 * 2 / 3.0e12), (512, 4 * 2**26 * 512 / 798e12)):
        shape = LayerShape(2**26 // (256 * dim), 256, dim)
        assert roofline.forward_floor(shape, 2, roofline.H100) == pytest.approx(bound)


def test_no_floor_lies_above_its_launches() -> None:
    for shape in (*registry.SHORT_SLICES, *registry.LONG_SLICES, *registry.MOBILEVITV2_LAYERS):
        floor = roofline.forward_floor(shape, 2, roofline.H100)
        launches = roofline.layer_seconds(shape, 2, roofline.H100, mode="forward")
        assert floor <= launches * (1 + 1e-9) and launches <= 1.75 * floor, shape


def test_workloads_are_what_they_say() -> None:
    assert all(
        shape.slices * shape.tokens * shape.dim >= registry.LARGE
        for shape in (*registry.SHORT_SLICES, *registry.LONG_SLICES)
    )
    assert len(registry.MOBILEVITV2_LAYERS) == 9
    assert {shape.tokens for shape in registry.LONG_SLICES} == {65_536, 2**20}


def test_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--bandwidth", "2e12"]) == 0
    printed = capsys.readouterr().out
    assert "slice_fwd_kernel" in printed and "value_gate_weights_bwd_kernel" in printed
