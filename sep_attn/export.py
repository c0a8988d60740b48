"""Programs for other runtimes: the operators of this package written in PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sep_attn import ops

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every forward operator of this package in PyTorch's own operators, in the pooled form.

    ``torch.export`` keeps the operators of this package in the program, which then runs where the
    package is imported. After this the program needs no custom operator, and computes the pooled
    form, a third less arithmetic than the layer as the paper writes it (eq. 3)::

        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        program = program.run_decompositions(sep_attn.decompositions())

    Other operators stay as they are. For the Core ATen set, update the table that
    ``torch.export.default_decompositions()`` gives with this one. ``torch.onnx.export`` of a model
    needs no table: it finds the pooled form by itself.

    Returns:
        ``{torch.ops.sep_attn....default: function}``, new at each call. The functions take and
        return tensors of any dtype, shapes and strides as their operator does. Backward operators
        are not among them: an exported program has none.
    """
    return dict(ops.DECOMPOSITIONS)
