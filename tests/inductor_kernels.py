"""A Triton kernel as Inductor writes it down: its own and this package's, in a program's text."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from torch._inductor.runtime.hints import AutotuneHint, ReductionHint, TileHint
from triton.compiler import ASTSource

from benchmarks.machine_code import TARGET, TARGETS

IMPORTS = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math

@triton.jit"""
# Tiles of Inductor's own kernels, by how they are decorated; it would choose them by timing.
TILES = {
    "pointwise": {"XBLOCK": 1024},
    "reduction": {"XBLOCK": 64, "R0_BLOCK": 64},
    "persistent_reduction": {"XBLOCK": 1},
}


class WrittenKernel:
    """What Inductor gives to ``AsyncCompile.triton``.

    Attributes:
        is_ours: whether the package wrote it, rather than Inductor.
        signature: the types of its arguments, ``"constexpr"`` of those compiled into it.
        constants: the values of the latter.
        passed: the arguments that a launch passes, in order.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        head, body = source.split("@triton.jit", 1)
        decorator = head[head.index("@triton_heuristics") :]
        form = decorator.partition("(")[0].rpartition(".")[2]
        self.is_ours = form == "user_autotune"
        meta: dict[str, Any] = {}
        namespace = {
            "keep": meta.update,
            "DeviceProperties": lambda **_: None,
            "ReductionHint": ReductionHint,
            "TileHint": TileHint,
            "AutotuneHint": AutotuneHint,
            "triton": triton,
            "__file__": "",
        }
        exec(f"keep({decorator.partition('(')[2].rpartition(')')[0]})", namespace)
        description = meta["triton_meta"]
        self.signature: dict[str, Any] = description["signature"]
        self.constants: dict[str, Any] = dict(description["constants"])
        self._attributes = description["configs"][0]
        self._body = body
        if self.is_ours:
            header = body[: body.index("):")]
            compiled_in = set(re.findall(r"(\w+): ?tl\.constexpr", header))
            self._options = dict(*meta["configs"])
        else:
            compiled_in = {name for name in self.signature if name.endswith("BLOCK")}
            self.constants |= {name: TILES[form][name] for name in compiled_in}
            self._options = {"num_warps": 4}
        self.passed = [name for name in self.signature if name not in compiled_in]

    @functools.cached_property
    def compiled(self) -> Any:
        """Compiled by Triton for the target."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{self.name}.py"
            file.write_text(IMPORTS + self._body)
            spec = importlib.util.spec_from_file_location(self.name, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.name] = module
            spec.loader.exec_module(module)
            found = re.search(r"def (\w+)\(", self._body)
            assert found is not None
            kernel = getattr(module, found[1])
            made = ASTSource(kernel, self.signature, self.constants, self._attributes)
            return triton.compile(made, target=TARGETS[TARGET], options=self._options)
