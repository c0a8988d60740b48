"""The C++ build: instruction sets and their dispatch, the binary itself, and how setup.py fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import Case, inputs_of, run

import sep_attn
from sep_attn import native
from sep_attn.version import __version__

_C = pytest.importorskip("sep_attn._C")

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ["context_pool", "gate", "separable_attention"]
DOT_PRODUCTS = "avx512_bf16"  # the last instruction set


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def keep_capability() -> Iterator[None]:
    before = native.capability()
    yield
    native.set_capability(before)


# Instruction sets --------------------------------------------------------------------------------


def test_the_module_is_of_this_version() -> None:
    assert _C.version() == __version__


def test_the_best_instruction_set_is_the_default() -> None:
    usable = native.capabilities()
    assert usable[0] in ("baseline", "neon")  # the worst one, and the only one of 64-bit ARM
    assert set(usable) <= set(native.compiled_capabilities())
    if DOT_PRODUCTS in usable and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        usable.remove(DOT_PRODUCTS)  # slower there than to widen
    code = "from sep_attn import native; print(native.capability())"
    assert run_python(code, SEP_ATTN_CPU_CAPABILITY="").stdout.split() == [usable[-1]]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc")
def test_the_usable_instruction_sets_are_those_that_the_processor_names() -> None:
    if "avx512" not in _C.compiled_capabilities():
        pytest.skip("this build holds no x86 instruction sets")
    flags = set(re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    needed = {"baseline": set(), "avx2": {"avx2", "fma", "f16c"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed[DOT_PRODUCTS] = needed["avx512"] | {"avx512_bf16"}
    assert native.capabilities() == [
        name for name in native.compiled_capabilities() if needed[name] <= flags
    ]


@pytest.mark.parametrize("capability", _C.capabilities())
def test_the_environment_picks_the_kernels_that_run(capability: str) -> None:
    code = """
import torch, sep_attn
from sep_attn import native
sep_attn.functional.gate(torch.ones(1, 2, 3), torch.ones(1, 3), backend="native")
print(native.capability(), native.kernel_calls())
"""
    result = run_python(code, SEP_ATTN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == f"{capability} {{'gate_forward/{capability}': 1}}", (
        result.stderr
    )


@pytest.mark.parametrize("capability", ["avx1024", "AVX2", "NEON"])
def test_an_instruction_set_that_is_not_there_is_refused_at_import(capability: str) -> None:
    result = run_python("import sep_attn._C", SEP_ATTN_CPU_CAPABILITY=capability)
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert f"SEP_ATTN_CPU_CAPABILITY is '{capability}'" in message
    assert ", ".join(_C.capabilities()) in message


def test_refused_kernels_serve_no_call() -> None:
    result = run_python(
        "import torch, warnings; from sep_attn import SeparableAttention\n"
        "from torch.profiler import profile\n"
        "layer, x = SeparableAttention(8), torch.randn(2, 5, 8)\n"
        "warnings.filterwarnings('error', message='sep_attn')\n"
        "for mode in (layer.train(), layer.eval()):\n"
        "    with profile() as profiler:\n"
        "        try: mode(x).sum().backward()\n"
        "        except UserWarning as warning: print(warning)\n"
        "    print(any('_native' in event.name for event in profiler.events()))\n",
        SEP_ATTN_CPU_CAPABILITY="unheard-of",
    )
    assert result.returncode == 0, result.stderr
    assert "in plain PyTorch" in result.stdout and "unheard-of" in result.stdout
    assert "True" not in result.stdout


def test_a_refused_instruction_set_leaves_the_package_usable() -> None:
    code = "import sep_attn; print(sep_attn.backends.unavailable_reason('native', cpu, float32))"
    code = "from torch import device, float32; cpu = device('cpu'); " + code
    result = run_python(code, SEP_ATTN_CPU_CAPABILITY="avx1024")
    assert "SEP_ATTN_CPU_CAPABILITY is 'avx1024'" in result.stdout, result.stderr


def test_set_capability_refuses_what_is_not_there() -> None:
    before = native.capability()
    with pytest.raises(ValueError, match=f"'mmx'.*usable.*{', '.join(_C.capabilities())}"):
        native.set_capability("mmx")
    assert native.capability() == before


@pytest.mark.parametrize("capability", _C.capabilities())
def test_every_kernel_call_is_counted(capability: str) -> None:
    native.set_capability(capability)
    native.reset_kernel_calls()
    x, scores, context = torch.randn(2, 5, 8), torch.randn(2, 5), torch.randn(2, 8)
    for calls in (1, 2):
        torch.ops.sep_attn.context_pool_native(x, scores, None, None, 1, 1)
        torch.ops.sep_attn.gate_native(x, context, "relu", 1, 1)
        torch.ops.sep_attn.gate_backward_native(x, x, context, "relu", 1, 1)
        assert native.kernel_calls() == {
            f"context_pool_forward/{capability}": calls,
            f"gate_forward/{capability}": calls,
            f"gate_backward/{capability}": calls,
        }
    native.reset_kernel_calls()
    assert native.kernel_calls() == {}


@pytest.mark.skipif(DOT_PRODUCTS not in _C.capabilities(), reason=f"needs {DOT_PRODUCTS}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_products_change_the_forward_pass_in_bfloat16_and_nothing_else(
    dtype: torch.dtype,
) -> None:
    case = Case((2, 50, 40), mask="random", need_weights=True)
    inputs = inputs_of(case, dtype, torch.device("cpu"))
    results = []
    for capability in ("avx512", DOT_PRODUCTS):
        native.set_capability(capability)
        native.reset_kernel_calls()
        results.append(run(sep_attn.functional.separable_attention, case, inputs, backend="native"))
        assert set(native.kernel_calls()) == {
            f"separable_attention_{direction}/{capability}" for direction in ("forward", "backward")
        }
    changed = {
        name for name, value in results[0].items() if not torch.equal(value, results[1][name])
    }
    if dtype != torch.bfloat16:
        assert changed == set()
    else:  # values kept for the backward pass are sums in another order
        assert "out" in changed and "weights" not in changed


# The binary --------------------------------------------------------------------------------------


def objdump(*options: str) -> str:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    return subprocess.run(
        ["objdump", *options, _C.__file__], capture_output=True, text=True, check=True
    ).stdout


def test_wide_registers_stay_in_the_functions_of_their_instruction_set() -> None:
    """Dot products of bfloat16 too. Also finds a template that the linker merged across
    instruction sets."""
    if "avx512" not in _C.compiled_capabilities():
        pytest.skip("this build holds no x86 instruction sets")
    registers: dict[str, set[str]] = defaultdict(set)
    dot_products: set[str] = set()
    function = ""
    for line in objdump("--disassemble", "--no-show-raw-insn").splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = match[1]
        else:
            registers[function].update(re.findall(r"%([yz])mm", line))
            if "\tvdpbf16ps " in line:
                dot_products.add(function)
    kernels: dict[str, list[str]] = defaultdict(list)
    kernels |= {
        capability: [
            name for name in registers if f"8sep_attn{len(capability)}{capability}" in name
        ]
        for capability in _C.compiled_capabilities()
    }
    assert all(len(names) > 10 for names in kernels.values()), "the symbols were stripped"
    for name, used in registers.items():
        with_z = kernels["avx512"] + kernels[DOT_PRODUCTS]
        if "z" in used:
            assert name in with_z, f"{name} uses zmm registers"
        if "y" in used:
            assert name in with_z + kernels["avx2"], f"{name} uses ymm registers"
    for capability, width in (("avx2", "y"), ("avx512", "z")):
        assert any(width in registers[name] for name in kernels[capability])
    assert dot_products <= set(kernels[DOT_PRODUCTS])
    products = {name for name in kernels[DOT_PRODUCTS] if "8multiplyI" in name}
    assert dot_products >= products
    # Both products, tokens as rows and on lanes, relu and identity in the first.
    assert len(products) >= 6 or DOT_PRODUCTS not in _C.compiled_capabilities()


def test_the_binary_names_torch_but_no_folder_of_the_build() -> None:
    headers = objdump("--private-headers")
    needed = set(re.findall(r"NEEDED +(\S+)", headers))
    assert "libtorch_cpu.so" in needed
    assert not any("libc10" in name or "python" in name or "omp" in name for name in needed)
    run_paths = re.findall(r"R(?:UN)?PATH +(\S+)", headers)
    assert run_paths == ["$ORIGIN/../torch/lib"]


def test_the_binary_takes_nothing_of_torch_but_its_stable_c_functions() -> None:
    undefined = re.findall(r"\*UND\*.* (\S+)$", objdump("--dynamic-syms"), re.MULTILINE)
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.match(r"_Z.*(2at|3c10|5torch)", name)]


# The operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS + [f"{name}_backward" for name in OPERATORS])
def test_importing_the_module_registers_the_operators(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sep_attn::{name}_native", "CPU")


@pytest.mark.parametrize(
    "v",
    [
        torch.randn(2, 3, 8),
        torch.randn(2, 8, 3).transpose(1, 2),
        torch.randn(3, 2, 8).transpose(0, 1),
        torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 8, 6, 4).transpose(2, 3),
        torch.randn(4, 6, 16)[::2, ::2, ::2],
        torch.randn(2, 1, 8).expand(2, 5, 8),
        torch.randn(1, 8, 4, 1),
        torch.randn(0, 8, 4, 6),
    ],
    ids=lambda v: f"{tuple(v.shape)}-{v.stride()}",
)
def test_results_have_the_strides_of_empty_like(v: torch.Tensor) -> None:
    context = torch.randn(v.shape[0], 8)
    assert torch.ops.sep_attn.gate_native(v, context, "relu", 1, 1).stride() == (
        torch.empty_like(v).stride()
    )


def test_poisoned_results_are_written_in_full() -> None:
    native.poison_results(True)
    try:
        y = torch.ops.sep_attn.gate_native(torch.ones(2, 3, 8), torch.ones(2, 8), "relu", 1, 1)
    finally:
        native.poison_results(False)
    assert torch.equal(y, torch.ones(2, 3, 8))


def test_a_call_says_what_is_wrong_with_its_arguments() -> None:
    v, context = torch.randn(2, 3, 8), torch.randn(2, 8)
    refusals = (ValueError, RuntimeError)  # torch 2.15 turns the first into the second
    with pytest.raises(refusals, match=r"context is \[2, 7\]; .* expected \[2, 8\]"):
        torch.ops.sep_attn.gate_native(v, context[:, :7], "relu", 1, 1)
    with pytest.raises(refusals, match="'tanh' is neither 'relu' nor 'identity'"):
        torch.ops.sep_attn.gate_native(v, context, "tanh", 1, 1)
    with pytest.raises(refusals, match=r"v is of type Int; .* expected float32"):
        torch.ops.sep_attn.gate_native(v.int(), context, "relu", 1, 1)


CALLS_LEAVE_NO_MEMORY = """
import os
import torch
from sep_attn import SeparableAttention

v, context = torch.randn(1, 2, 8), torch.randn(1, 8)
layer, x = SeparableAttention(8).eval(), torch.randn(1, 2, 8)

def operator():
    torch.ops.sep_attn.gate_native(v, context, "relu", 1, 1)

def inference():
    with torch.inference_mode():
        layer(x)

def training():
    layer(x).sum().backward()

def resident_after(call, calls):
    for _ in range(calls):
        call()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for call, calls in ((operator, 100_000), (inference, 20_000), (training, 20_000)):
    before = resident_after(call, calls // 10)
    print((resident_after(call, calls) - before) / calls)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_call_leaves_no_memory_behind() -> None:
    # In a process of its own: nothing else allocates there meanwhile.
    result = run_python(CALLS_LEAVE_NO_MEMORY)
    assert result.returncode == 0, result.stderr
    bytes_of_one_call = [float(line) for line in result.stdout.split()]
    assert len(bytes_of_one_call) == 3
    # The least that one call could leave behind is a tensor's 64 bytes; the allocator keeps some.
    assert max(bytes_of_one_call) < 32


def test_one_thread_and_many_give_the_same_bits() -> None:
    x, scores, context = torch.randn(3, 1000, 40), torch.randn(3, 1000), torch.randn(3, 40)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                [
                    *torch.ops.sep_attn.context_pool_native(x, scores, None, None, 1, 1),
                    *torch.ops.sep_attn.gate_backward_native(x, x, context, "relu", 1, 1),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


# setup.py ----------------------------------------------------------------------------------------


def run_setup(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    build_folders = ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    return subprocess.run(
        [sys.executable, "setup.py", *arguments, *build_folders],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_compiler_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "build_ext", PATH=str(tmp_path), CXX="")
    assert result.returncode != 0
    for part in ("needs a C++ compiler", "apt install g++", "SEP_ATTN_SKIP_NATIVE=1"):
        assert part in result.stderr
    assert not (tmp_path / "lib").exists()


def test_an_old_setuptools_is_an_error_that_says_what_to_do() -> None:
    result = run_python(
        f"import runpy, setuptools; setuptools.__version__ = '65.5.0'; "
        f"runpy.run_path({str(ROOT / 'setup.py')!r})"
    )
    assert result.returncode == 1
    assert "has 65.5.0: pip install 'setuptools>=77'" in result.stderr


def test_a_bad_number_of_jobs_is_an_error(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "build_ext", MAX_JOBS="many")
    assert result.returncode != 0
    assert "MAX_JOBS is 'many'; expected a number of jobs" in result.stderr


def test_the_kernels_can_be_left_out(tmp_path: Path) -> None:
    result = run_setup(tmp_path, "build_ext", SEP_ATTN_SKIP_NATIVE="1", PATH=str(tmp_path), CXX="")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("_C*.so"))
