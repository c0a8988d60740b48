"""Builds sep_attn._C with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: ``SEP_ATTN_SKIP_NATIVE=1`` leaves the C++ kernels out, ``CXX`` names the compiler,
``MAX_JOBS`` or ``CMAKE_BUILD_PARALLEL_LEVEL`` bounds the number of compilers running at once,
``CMAKE_ARGS`` holds further arguments for CMake.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
OLDEST_SETUPTOOLS = 77  # reads the license in pyproject.toml; pip's isolated builds have it
SKIP_HINT = (
    "Or set SEP_ATTN_SKIP_NATIVE=1 to install without the CPU kernels: CPU tensors are then "
    "computed in plain PyTorch."
)


def find_tool(name: str) -> str:
    """``cmake`` or ``ninja``: beside this Python, else on the PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise PlatformError(f"sep_attn needs {name}: pip install {name}. {SKIP_HINT}")
    return path


def find_compiler() -> str:
    named = os.environ.get("CXX")
    names = [named.split()[-1]] if named else ["c++", "g++", "clang++"]
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise PlatformError(
        f"sep_attn needs a C++ compiler and found none (looked for {', '.join(names)}). "
        f"Install one (Debian: apt install g++) or name it in CXX. {SKIP_HINT}"
    )


def check_python_headers() -> None:
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        raise PlatformError(
            f"sep_attn needs Python's C headers, and {folder}/Python.h is missing. "
            f"Install them (Debian: apt install python3-dev). {SKIP_HINT}"
        )


def parallel_jobs() -> int:
    for variable in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if value := os.environ.get(variable):
            if not value.isdigit() or int(value) < 1:
                raise PlatformError(
                    f"{variable} is {value!r}; expected a number of jobs, 1 or more"
                )
            return int(value)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, 8)


class CMakeBuild(build_ext):
    """Runs CMake in the build folder, which keeps its objects from one build to the next."""

    def build_extension(self, extension: Extension) -> None:
        find_compiler()
        check_python_headers()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = self.cmake_folder()
        self.forget_other_tools(folder, [sys.prefix, cmake, ninja, os.environ.get("CXX", "")])
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = str(self.parallel or parallel_jobs())
        for command in (configure, [cmake, "--build", str(folder), "--parallel", jobs]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise CompileError(
                    f"building sep_attn's C++ kernels failed (exit status {error.returncode} of "
                    f"{' '.join(command)}); the cause is above. {SKIP_HINT}"
                ) from error

    def cmake_folder(self) -> Path:
        """Where the objects are kept: an editable install, too, builds where the others do."""
        temp = Path(self.build_temp)
        if self.editable_mode:
            temp = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return temp.resolve() / "sep_attn-native"

    @staticmethod
    def forget_other_tools(folder: Path, tools: list[str]) -> None:
        """Empties the build folder when another Python, CMake, Ninja or compiler made it.

        A cache that names the deleted tools of an isolated build cannot be configured again.
        """
        record = folder / "configured-by"
        described = "\n".join(tools)
        if folder.exists() and not (record.exists() and record.read_text() == described):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(described)


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"sep_attn is built with setuptools {OLDEST_SETUPTOOLS} or later, and this Python has "
        f"{setuptools.__version__}: pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
    )
skip_native = os.environ.get("SEP_ATTN_SKIP_NATIVE", "0") not in ("", "0")
setup(
    ext_modules=[] if skip_native else [Extension("sep_attn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
