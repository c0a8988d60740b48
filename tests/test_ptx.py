"""The machine that runs PTX (``tests/ptx``): that it faults where it should, and not elsewhere; and
some calls of the layer on it. ``make test-ptx`` runs all of ``test_layer.py`` so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx.assembly import parse
from ptx.instructions import convert, multiply
from ptx.machine import Machine
from ptx.memory import Fault, GlobalMemory

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
	ld.param.b64 %in, [kernel_param_0];
	ld.param.b64 %out, [kernel_param_1];
	mov.u32 %tid, %tid.x;
	mov.u32 %program, %ctaid.x;
	mad.wide.u32 %mine, %tid, 4, %in;
	mad.wide.u32 %yours, %tid, 4, %out;
	xor.b32 %other, %tid, {distance};
	shl.b32 %r1, %tid, 2;
	mov.b64 %smem, global_smem;
	cvt.u32.u64 %r2, %smem;
	add.s32 %here, %r1, %r2;
	shl.b32 %r3, %other, 2;
	add.s32 %there, %r3, %r2;
	setp.eq.b32 %first, %tid, 0;
"""


def run_ptx(
    body: str, given: Tensor, out: Tensor, programs: int = 1, threads: int = 64, distance: int = 32
) -> None:
    """Runs these lines after HEAD; ``%there`` is the place in shared memory of the thread that is
    ``distance`` away."""
    assembly = parse(HEAD.format(threads=threads, distance=distance) + body + "\n\tret;\n}\n")
    parameters = {
        name: np.uint64(tensor.data_ptr())
        for name, tensor in zip(assembly.parameters, (given, out), strict=True)
    }
    machine = Machine(assembly, parameters, GlobalMemory({"given": given, "out": out}), 4096)
    for program in range(programs):
        machine.run((program, 0, 0), (programs, 1, 1), program)


LOAD = "ld.global.b32 %x, [ %mine + 0 ];\n"
STORE = "st.global.b32 [ %yours + 0 ], { %y };\n"
SHARE = LOAD + "st.shared.b32 [ %here + 0 ], %x;\n"
READ = "ld.shared.b32 %y, [ %there + 0 ];\n"
RECEIVE = READ + STORE
REPLACE = "st.shared.b32 [ %here + 0 ], %r1;\n"
BARRIER = "bar.sync 0;\n"
COPY = "cp.async.ca.shared.global [ %here + 0 ], [ %mine + 0 ], 0x4;\ncp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"


def test_threads_exchange_values() -> None:
    given, out = torch.arange(64.0), torch.zeros(64)
    run_ptx(SHARE + BARRIER + RECEIVE, given, out)
    assert torch.equal(out, given.view(2, 32).flip(0).flatten())
    run_ptx(COPY + WAIT + BARRIER + RECEIVE, given + 1, out)
    assert torch.equal(out, given.view(2, 32).flip(0).flatten() + 1)


def test_threads_of_a_warp_need_less() -> None:
    given, out = torch.arange(32.0), torch.zeros(32)
    body = SHARE + "bar.warp.sync 0xffffffff;\n" + RECEIVE
    run_ptx(body, given, out, threads=32, distance=1)
    assert torch.equal(out, given.view(16, 2).flip(1).flatten())
    shuffle = LOAD + "shfl.sync.bfly.b32 %y, %x, 1, 31, -1;\n" + STORE
    run_ptx(shuffle, given + 1, out, threads=32)
    assert torch.equal(out, given.view(16, 2).flip(1).flatten() + 1)


def test_threads_take_different_ways() -> None:
    given, out = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    # The way that few take lies behind the place where all meet again.
    body = """
	@%first bra $few;
	mov.b32 %y, 1;
$all:
	bar.sync 0;
	st.global.b32 [ %yours + 0 ], { %y };
	bra.uni $end;
$few:
	mov.b32 %y, 2;
	bra.uni $all;
$end:
"""
    run_ptx(body, given, out)
    assert out.tolist() == [2] + [1] * 63


@pytest.mark.parametrize(
    "body, message",
    [
        (SHARE + RECEIVE, "written by one thread, read by another"),
        (SHARE + BARRIER + READ + REPLACE, "read by one thread, written by another"),
        (SHARE + REPLACE.replace("here", "there"), "written by one thread, written by another"),
        (COPY + BARRIER + RECEIVE, "while an asynchronous copy fills it"),
        (COPY + REPLACE, "while an asynchronous copy fills it"),
        (COPY, "ends while copies"),
        (LOAD + "st.shared.b32 [ %r2 + 0 ], %x;\n", "store different values in one place"),
        ("st.shared.b32 [ %r2 + 0 ], %tid;\n", "store different values in one place"),
        ("@%first fence.proxy.async;\n", "not by all threads"),
        ("ld.shared.b32 %y, [ %here + 4096 ];\n", "outside"),
        ("ld.global.b32 %y, [ %mine + 2 ];\n", "no multiple"),
        ("ld.global.v2.b32 { %y, %z }, [ %mine + 0 ];\n", "no multiple"),
        ("ld.global.b32 %y, [ %mine + 4 ];\n", "outside"),
        ("@%first bra $on;\nbar.sync 0;\n$on:\nshfl.sync.bfly.b32 %y, %tid, 1, 31, -1;\n", "wait"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run_ptx(body, torch.arange(64.0), torch.zeros(64))


def test_programs_keep_apart() -> None:
    given, out = torch.arange(64.0), torch.zeros(64)
    run_ptx("mov.b32 %y, 7;\n" + STORE, given, out, programs=3)  # all store the same
    with pytest.raises(Fault, match="written by one program, written by another"):
        run_ptx("mov.b32 %y, %program;\n" + STORE, given, torch.ones(64), programs=3)
    with pytest.raises(Fault, match="written by one program, read by another"):
        body = "ld.global.b32 %x, [ %yours + 0 ];\nmov.b32 %y, 7;\n" + STORE
        run_ptx(body, given, out.zero_(), programs=2)


def test_values_between_the_elements_of_a_tensor() -> None:
    given = torch.arange(128.0)[::2]
    with pytest.raises(Fault, match="no element of a tensor"):
        run_ptx(LOAD + "mov.b32 %y, %x;\n" + STORE, given, torch.zeros(64))


# A product of a warpgroup, of shared memory of zeros.
ZEROS = "mov.b32 %zero, 0;\nst.shared.v4.b32 [ %quad + 0 ], { %zero, %zero, %zero, %zero };\n"
PREPARE = "shl.b32 %r4, %tid, 4;\nadd.s32 %quad, %r4, %r2;\n" + ZEROS
FENCE = "fence.proxy.async.shared::cta;\n"
# At byte 1024, 8 rows of 16 bytes side by side, without a swizzle; sums from 0.
DESCRIBE = f"mov.b64 %d, {8 << 32 | 8 << 16 | 1024 >> 4};\n"
SUMS = "{ %s0, %s1, %s2, %s3 }"
MULTIPLY = (
    "".join(f"mov.b32 %s{i}, 0;\n" for i in range(4))
    + "wgmma.fence.sync.aligned;\n"
    + f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {SUMS}, %d, %d, 1, 1, 1, 0, 0;\n"
    + "wgmma.commit_group.sync.aligned;\n"
)
FINISH = "wgmma.wait_group.sync.aligned 0;\n"


@pytest.mark.parametrize(
    "body, message",
    [
        (PREPARE + FENCE + BARRIER + DESCRIBE + MULTIPLY + FINISH + "mov.b32 %y, %s0;\n", ""),
        (PREPARE + FENCE + DESCRIBE + MULTIPLY + FINISH, "no barrier after the store"),
        (PREPARE + BARRIER + DESCRIBE + MULTIPLY + FINISH, "no fence after the store"),
        (PREPARE + FENCE + BARRIER + DESCRIBE + MULTIPLY, "ends while copies or products"),
        (
            PREPARE + FENCE + BARRIER + DESCRIBE + MULTIPLY + "mov.b32 %y, %s0;\n",
            "read while tensor cores add to it",
        ),
        (
            PREPARE + FENCE + BARRIER + DESCRIBE + MULTIPLY + "mov.b32 %s0, 0;\n",
            "written while tensor cores use it",
        ),
        (
            PREPARE + FENCE + BARRIER + DESCRIBE + MULTIPLY + ZEROS.replace("0;", "1;", 1),
            "written while tensor cores read it",
        ),
    ],
)
def test_products_of_tensor_cores(body: str, message: str) -> None:
    given, out = torch.zeros(128), torch.zeros(128)
    if not message:
        run_ptx(body + STORE, given, out, threads=128)
        return
    with pytest.raises(Fault, match=message):
        run_ptx(body, given, out, threads=128)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e38, 1e-40, float("inf")])])
    bits = convert(("cvt", "rn", "bf16", "f32"), values.numpy().view(np.uint32))
    assert np.array_equal(bits, values.bfloat16().view(torch.int16).numpy().view(np.uint16))


def test_upper_halves_of_products() -> None:
    a, b = (torch.randint(-(2**63), 2**63 - 1, (1000,)) for _ in range(2))
    for kind, bits, words in (("s64", 64, (a, b)), ("s32", 32, (a.int(), b.int()))):
        found = multiply(("mul", "hi", kind), kind, *(word.numpy() for word in words))
        products = [x * y >> bits for x, y in zip(*(w.tolist() for w in words), strict=True)]
        assert found.tolist() == products
        unsigned = [word.numpy().view(f"u{bits // 8}") for word in words]
        found = multiply(("mul", "hi", "u"), f"u{bits}", *unsigned)
        products = [x * y >> bits for x, y in zip(*(w.tolist() for w in unsigned), strict=True)]
        assert found.tolist() == products


def test_bytes_and_fields() -> None:
    given, out = torch.arange(-90, 166, 4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    byte = LOAD + "cvt.s8.s32 %rs1, %x;\n"
    for widened in ("cvt.s32.s8 %y, %rs1;\n", "cvt.s32.s16 %y, %rs1;\n"):
        run_ptx(byte + widened + STORE, given, out)
        assert torch.equal(out, given.to(torch.int8).int())
    run_ptx(LOAD + "bfi.b32 %y, %x, 1515870810, 8, 6;\n" + STORE, given, out)
    field = 0x3F << 8
    assert torch.equal(out, 0x5A5A5A5A & ~field | given << 8 & field)


# One call of each form: tokens apart, side by side and in patches; a mask, a source, dropout.
CALLS = (
    "2x37x16-value_act=identity-need_weights=True-dtype3-triton",
    "2x24x4x16-mask=random-dropout_p=0.1-dtype2-triton",
    "2x12x8x6-patch_size=(4, 1)-prev_shape=(2, 12, 4, 10)-dtype3-triton",
)


def test_compiled_kernels_give_the_layer(tmp_path: Path) -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    tests = [f"{Path(__file__).parent}/test_layer.py::test_every_option[{call}]" for call in CALLS]
    command = [sys.executable, "-m", "pytest", "--ptx", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"{len(CALLS)} passed" in result.stdout
