"""The API reference: it builds without a warning and holds every public name."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sep_attn

ROOT = Path(__file__).resolve().parent.parent


def public_names() -> Iterator[tuple[str, object]]:
    """What `sep_attn.__all__` holds, and what the `__all__` of a module in it holds."""
    for name in sep_attn.__all__:
        value = getattr(sep_attn, name)
        yield f"sep_attn.{name}", value
        if isinstance(value, types.ModuleType):
            for member in value.__all__:
                yield f"sep_attn.{name}.{member}", getattr(value, member)


@pytest.mark.parametrize(
    "name, value", [pytest.param(*pair, id=pair[0]) for pair in public_names()]
)
def test_every_public_name_has_a_docstring(name: str, value: object) -> None:
    if name == "sep_attn.__version__":
        return
    assert inspect.getdoc(value), f"{name} has no docstring"


def test_the_reference_builds_without_warnings_and_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    command = ["sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # Four lines of text come first.
    *_, objects = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)
    listed = {line.split()[0] for line in zlib.decompress(objects).decode().splitlines()}
    missing = {name for name, _ in public_names()} - listed
    assert missing == set(), f"add them to docs/index.rst: {missing}"
