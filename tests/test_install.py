"""Installation: what is missing is named, and sdist and wheel hold what they should and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What is missing ---------------------------------------------------------------------------------

# An editable installation finds its own sep_attn._C for whichever sep_attn was imported.
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
import warnings, torch, sep_attn
from sep_attn.__main__ import main
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert sep_attn.SeparableAttention(8)(torch.randn(2, 5, 8)).shape == (2, 5, 8)
main()
"""


def package_without_kernels(folder: Path) -> Path:
    """A copy of the package's Python files in ``folder``."""
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    return shutil.copytree(ROOT / "sep_attn", folder / "sep_attn", ignore=leave_out)


def use(folder: Path, code: str = USE, **environment: str) -> str:
    """What the package in ``folder`` says of itself after it has served a call."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_neither_kernels_nor_triton(tmp_path: Path) -> None:
    package_without_kernels(tmp_path)
    said = use(tmp_path, f"import sys; sys.modules['triton'] = None\n{USE}")
    assert "missing: GPU kernels: triton does not import" in said
    assert 'pip install "sep_attn[triton]"' in said
    assert "missing: CPU kernels: the C++ kernels are not built" in said
    assert "apt install g++" in said and "reinstall without SEP_ATTN_SKIP_NATIVE" in said
    assert "native     no: the C++ kernels are not built" in said


def test_broken_kernels(tmp_path: Path) -> None:
    """Whatever importing them raises."""
    broken = package_without_kernels(tmp_path) / "_C.py"
    broken.write_text("raise RuntimeError('an operator of this name exists')")
    said = use(tmp_path)
    assert "missing: CPU kernels: the C++ kernels did not load: " in said
    assert "need torch 2.10 or later (this is 2." in said and "reinstall sep_attn" in said


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (package_without_kernels(tmp_path) / "_C.abi3.so").write_bytes(b"not ELF")
    assert "missing: CPU kernels: the C++ kernels did not load: " in use(tmp_path)


def test_an_instruction_set_that_this_cpu_lacks() -> None:
    pytest.importorskip("sep_attn._C")
    said = use(ROOT, SEP_ATTN_CPU_CAPABILITY="avx1024")
    assert "missing: CPU kernels: the C++ kernels did not load: " in said
    assert "SEP_ATTN_CPU_CAPABILITY is 'avx1024'" in said and "reinstall" not in said


# sdist and wheel ---------------------------------------------------------------------------------


def run(*command: object, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder,
        # The kernels take minutes to compile: `make wheel` builds them from the sdist.
        env={**os.environ, "SEP_ATTN_SKIP_NATIVE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a working tree that somebody has built and tested in."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    leave_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "results", "*.egg-info")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=leave_out)
    for leftover in ("build/temp/a.o", "sep_attn/_C.cpython-310-x86_64-linux-gnu.so", "csrc/a.o"):
        (tree / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tree / leftover).touch()
    run("build", "--sdist", "--no-isolation", "--outdir", folder, folder=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sources(folder: Path) -> set[str]:
    """What the package is built from, in a clone or in an sdist."""
    names = {f"csrc/{name}" for name in files_of(folder / "csrc")}
    names |= {f"sep_attn/{name}" for name in files_of(folder / "sep_attn")}
    leftovers = (".so", ".pyc", ".o")
    return {name for name in names if not name.endswith(leftovers)}


def test_sdist_holds_the_sources_and_no_leftovers(sdist: Path) -> None:
    held = files_of(sdist)
    outside = {name for name in held if not name.startswith(("csrc/", "sep_attn/"))}
    assert held - outside == sources(ROOT)
    assert {name for name in outside if not name.startswith("sep_attn.egg-info/")} == {
        "CHANGELOG.md",
        "CMakeLists.txt",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
    }


def test_a_wheel_builds_from_the_sdist_and_holds_no_leftovers(sdist: Path, tmp_path: Path) -> None:
    run(
        *("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", tmp_path, sdist),
        folder=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in held if ".dist-info/" not in name}
    assert package == {name for name in sources(ROOT) if name.startswith("sep_attn/")}
    metadata = {name.partition(".dist-info/")[2] for name in held - package}
    assert metadata == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}


def test_the_tests_of_the_wheel_need_nothing_else_of_the_repository(tmp_path: Path) -> None:
    script = (ROOT / "tools" / "abi.sh").read_text()
    names = re.findall(r"test_\w+\.py", script)
    assert len(names) > 5
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    package_without_kernels(tmp_path / "installed")
    options = ("-q", "--collect-only", "-c", "/dev/null", "--rootdir", ".")
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *names],
        cwd=tmp_path / "tests",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        stdout=subprocess.PIPE,
        check=True,
    )
