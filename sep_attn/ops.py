"""The operators of namespace ``sep_attn``: every schema, fake and autograd formula, in this place.

An operator exists once a backend: ``context_pool_native`` is served by the C++ kernels (they
register themselves when ``sep_attn._C`` is imported), ``context_pool_triton`` by the Triton
launchers. Both share one schema, one fake and one formula. Arguments are checked in
:mod:`sep_attn.validation` before an operator is called; ``patch_h`` and ``patch_w`` describe the
layout (:mod:`sep_attn.layout`). ``S`` counts slices, ``tokens`` is ``[B, N]`` or ``[B, H, W]``,
and *acc* is the accumulation dtype, float32, or float64 for float64.

==================== ===============================================================================
``context_pool``      ``pooled [S, D] acc``, ``weight_sum [S] acc``, ``weights tokens acc``
``gate``              ``act(v) * context[slice]``
``separable_attention`` ``out``, ``weights tokens acc``, ``statistics [S, 2 D + 1] acc``: pooled
                      input, context and weight sum of each slice; ``values``, kept for the
                      backward pass (``for_backward``), or empty; ``_inference``: ``out``;
                      ``_packed``: ``out``, with packed weights kept in the caller's memory
==================== ===============================================================================

``separable_attention`` differs between backends in one thing: the native one is given what
attention dropout multiplies the weights by (``dropout_scale``), the Triton one a seed on the device
and the probability, and draws the same twice.

``torch.compile`` sees the Triton operators' kernels, as it does with ``torch.library.triton_op``:
once its functionalisation meets an operator on a GPU, the launcher runs again, on symbolic sizes,
and each launch becomes a node (:mod:`sep_attn.triton_kernels.tracing`). ``torch.export`` keeps the
operators whole. They are not made with ``triton_op`` itself, whose operators pass through Python
several times before they do anything, in eager mode too.

Of the number of tokens a traced program asks, upper bounds of 32 bits aside, one thing: which path
they take (:func:`sep_attn.triton_kernels.attention.path_of`). How tokens are split is arithmetic on
it. So there is a graph for short slices and one for long ones, and one for few tokens of many
channels, for which, and for wider layers, training has one more where slices are a single tile.
Where tokens are contiguous in memory, as in ``[B, D, P, N]``, each comes in two kinds: for N in
whole 16-byte words, and for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library import triton as triton_library
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad

from sep_attn import pooled, reference, triton_kernels
from sep_attn.backends import has_memory, is_observed, is_transformed
from sep_attn.layout import (
    accumulate_dtype,
    keeps_values,
    kept_values_size,
    num_channels,
    token_shape,
)

_library = torch.library.Library("sep_attn", "DEF")


def _define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"sep_attn::{name}", fake, lib=_library)


def _serve_with_triton(name: str, launcher: Callable[..., Any]) -> None:
    # CPU tensors reach Triton under its interpreter only; sep_attn.backends sees to that.
    for key in ("CUDA", "XPU", "CPU"):
        _library.impl(name, launcher, key)
    qualified = f"sep_attn::{name}"

    # What torch.library.triton_op registers beside its kernels.
    def decompose(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled() or not triton_kernels.traces(args[0].device):
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        known = (FakeTensor, FunctionalTensor)
        if not all(kind is Tensor or issubclass(kind, known) for kind in types):
            return NotImplemented
        with mode, triton_kernels.tracing_launches():
            return launcher(*map(_in_memory_once, args), **kwargs)

    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decompose, lib=_library)
    triton_library.triton_ops_to_kernels[qualified] = triton_kernels.Sources()


def _in_memory_once(value: Any) -> Any:
    """``value``; Inductor is told to write it to memory once, not once for each kernel it goes to,
    as it would with what it computes within another kernel."""
    from torch._inductor import inductor_prims

    if isinstance(value, Tensor) and (
        value.is_contiguous()
        or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
    ):
        return inductor_prims.force_stride_order(value, value.stride())
    return value


def _refuse_tangents(gradients: Sequence[Tensor | None]) -> None:
    if forward_ad._current_level >= 0 and any(
        gradient is not None and forward_ad.unpack_dual(gradient).tangent is not None
        for gradient in gradients
    ):
        raise NotImplementedError(
            "sep_attn's backward pass has no forward-mode derivative; "
            'use backend="reference" where one is needed'
        )


def _differentiate(
    name: str, setup_context: Callable[..., None], formula: Callable[..., Any]
) -> None:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _refuse_tangents(grads)
        return formula(ctx, *grads)

    torch.library.register_autograd(
        f"sep_attn::{name}", backward, setup_context=setup_context, lib=_library
    )
    operator = getattr(torch.ops.sep_attn, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():  # for a second derivative, which the operator refuses
                return backward(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name
    _FUNCTIONS[name] = Function


# The same formulas for calls from Python: torch.library's way to a formula, and autograd's to one
# with a setup_context, take about 100 microseconds a call. Compilers and vmap, which need them, go
# through the operator.
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def _call(name: str, backend: str, args: tuple[Any, ...]) -> Any:
    function = _FUNCTIONS.get(f"{name}_{backend}")
    if (
        function is None
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return _operator(name, backend)(*args)
    return function.apply(*args)


def _refuse_double_backward(name: str) -> None:
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(
            f"sep_attn::{name} has no second derivative; "
            'use backend="reference" where one is needed'
        )

    torch.library.register_autograd(f"sep_attn::{name}", backward, lib=_library)


def _slices(x: Tensor, patch_h: int, patch_w: int) -> int:
    return x.shape[0] * patch_h * patch_w


def _per_token(x: Tensor) -> Tensor:
    return x.new_empty(token_shape(x), dtype=accumulate_dtype(x.dtype))


def _per_slice(x: Tensor, patch_h: int, patch_w: int, *columns: int) -> Tensor:
    shape = (_slices(x, patch_h, patch_w), *columns)
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


# context_pool ------------------------------------------------------------------------------------


def _context_pool_fake(
    x: Tensor,
    scores: Tensor,
    key_padding_mask: Tensor | None,
    dropout_scale: Tensor | None,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pooled = _per_slice(x, patch_h, patch_w, num_channels(x))
    return pooled, _per_slice(x, patch_h, patch_w), _per_token(x)


def _context_pool_backward_fake(
    grad_pooled: Tensor,
    grad_weight_sum: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    *saved: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _per_token(x)


def _context_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scores, _, dropout_scale, ctx.patch_h, ctx.patch_w = inputs
    ctx.scores_dtype = scores.dtype
    ctx.save_for_backward(x, dropout_scale, *output)
    ctx.set_materialize_grads(False)


def _context_pool_formula(backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(
        ctx: Any,
        grad_pooled: Tensor | None,
        grad_weight_sum: Tensor | None,
        grad_weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, dropout_scale, pooled, weight_sum, weights = ctx.saved_tensors
        if grad_pooled is None:
            grad_pooled = pooled.new_zeros(()).expand_as(pooled)
        grad_x, grad_scores = _operator("context_pool_backward", backend)(
            grad_pooled,
            grad_weight_sum,
            grad_weights,
            x,
            pooled,
            weight_sum,
            weights,
            dropout_scale,
            ctx.patch_h,
            ctx.patch_w,
        )
        return grad_x, grad_scores.to(ctx.scores_dtype), None, None, None, None

    return backward


# gate --------------------------------------------------------------------------------------------


def _gate_fake(v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int) -> Tensor:
    return torch.empty_like(v)


def _gate_backward_fake(
    grad_y: Tensor, v: Tensor, context: Tensor, act: str, patch_h: int, patch_w: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), _per_slice(v, patch_h, patch_w, num_channels(v))


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, context, ctx.act, ctx.patch_h, ctx.patch_w = inputs
    ctx.save_for_backward(v, context)


def _gate_formula(backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        v, context = ctx.saved_tensors
        grad_v, grad_context = _operator("gate_backward", backend)(
            grad_y, v, context, ctx.act, ctx.patch_h, ctx.patch_w
        )
        return grad_v, grad_context.to(context.dtype), None, None, None

    return backward


# separable_attention -----------------------------------------------------------------------------


def _separable_attention_fake(
    x: Tensor,
    x_prev: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    act: str,
    patch_h: int,
    patch_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = _per_slice(x, patch_h, patch_w, 2 * num_channels(x) + 1)
    return torch.empty_like(x), _per_token(x if x_prev is None else x_prev), statistics


def _refuse_meta_parameters(x: Tensor) -> None:
    # A fake answers for every call in which any tensor is on meta. The shortest way trusts it.
    if type(x) is Tensor and not x.is_meta:
        raise ValueError(f"x is on {x.device} and a parameter on meta")


def _separable_attention_native_fake(
    x: Tensor, x_prev: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_meta_parameters(x)
    *tensors, act, patch_h, patch_w, for_backward = arguments
    fake: Callable[..., Any] = _separable_attention_fake
    results = fake(x, x_prev, *tensors, 0.0, act, patch_h, patch_w)
    kept = kept_values_size(x) if for_backward and keeps_values(x) else 0
    return *results, results[1].new_empty(kept)


def _separable_attention_inference_fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


def _separable_attention_packed_fake(x: Tensor, *arguments: Any) -> Tensor:
    _refuse_meta_parameters(x)
    return torch.empty_like(x)


def _separable_attention_backward_fake(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    x_prev: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *_, need_input_grad, need_weight_grad = arguments
    dim = num_channels(x)

    def weight_grad(*shape: int) -> Tensor:
        return x.new_empty(shape if need_weight_grad else (0,))

    return (
        torch.empty_like(x) if need_input_grad else x.new_empty(0),
        x.new_empty(0) if x_prev is None or not need_input_grad else torch.empty_like(x_prev),
        weight_grad(1 + 2 * dim, dim),
        weight_grad(1 + 2 * dim),
        weight_grad(dim, dim),
        weight_grad(dim),
    )


def _separable_attention_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    x, x_prev, qkv_weight, qkv_bias, out_weight, _, _, dropout, *options = inputs
    _, weights, statistics, *values = output
    ctx.options = options[: len(options) - len(values)]  # all but for_backward
    ctx.save_for_backward(
        x, x_prev, qkv_weight, qkv_bias, out_weight, dropout, weights, statistics, *values
    )
    ctx.mark_non_differentiable(statistics, *values)
    ctx.set_materialize_grads(False)


def _separable_attention_formula(backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = x.new_zeros(()).expand_as(x)
        needed = ctx.needs_input_grad[:6]
        grads = _operator("separable_attention_backward", backend)(
            grad_out,
            grad_weights,
            x,
            *saved,
            *ctx.options,
            any(needed[:2]),
            any(needed[2:]),
        )
        wanted: Sequence[Tensor | None] = [
            grad if need else None for grad, need in zip(grads, needed, strict=True)
        ]
        return *wanted, *(None for _ in ctx.needs_input_grad[6:])

    return backward


def _inference_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8])


def _inference_formula(backend: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Computes the layer again. For programs that were traced where no gradient was wanted, and are
    differentiated all the same."""
    formula = _separable_attention_formula(backend)
    for_backward = (True,) if _LAYER_KEPT[backend][0] else ()

    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        x, x_prev, qkv_weight, qkv_bias, out_weight, _, _, dropout = tensors
        with torch.no_grad():
            _, *kept = _operator("separable_attention", backend)(
                *tensors, *ctx.options, *for_backward
            )
        again = SimpleNamespace(
            saved_tensors=(x, x_prev, qkv_weight, qkv_bias, out_weight, dropout, *kept),
            options=ctx.options,
            needs_input_grad=ctx.needs_input_grad,
        )
        return formula(again, grad_out, None)

    return backward


# Registration ------------------------------------------------------------------------------------

_CONTEXT_POOL = (
    "(Tensor x, Tensor scores, Tensor? key_padding_mask, Tensor? dropout_scale,"
    " SymInt patch_h, SymInt patch_w) -> (Tensor pooled, Tensor weight_sum, Tensor weights)"
)
_CONTEXT_POOL_BACKWARD = (
    "(Tensor grad_pooled, Tensor? grad_weight_sum, Tensor? grad_weights, Tensor x, Tensor pooled,"
    " Tensor weight_sum, Tensor weights, Tensor? dropout_scale, SymInt patch_h, SymInt patch_w)"
    " -> (Tensor grad_x, Tensor grad_scores)"
)
_GATE = "(Tensor v, Tensor context, str act, SymInt patch_h, SymInt patch_w) -> Tensor"
_GATE_BACKWARD = (
    "(Tensor grad_y, Tensor v, Tensor context, str act, SymInt patch_h, SymInt patch_w)"
    " -> (Tensor grad_v, Tensor grad_context)"
)
_LAYER_TENSORS = (
    "Tensor x, Tensor? x_prev, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight,"
    " Tensor? out_bias, Tensor? key_padding_mask"
)
_LAYER_BACKWARD_TENSORS = (
    "Tensor grad_out, Tensor? grad_weights, Tensor x, Tensor? x_prev, Tensor qkv_weight,"
    " Tensor? qkv_bias, Tensor out_weight"
)
_LAYER_NEEDS = "bool need_input_grad, bool need_weight_grad"
_LAYER_GRADIENTS = (
    "(Tensor grad_x, Tensor grad_x_prev, Tensor grad_qkv_weight,"
    " Tensor grad_qkv_bias, Tensor grad_out_weight, Tensor grad_out_bias)"
)
_LAYER_PACKED = (
    "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias,"
    " Tensor(a!) packed_weights, bool relu, int patch_h, int patch_w) -> Tensor"
)
_LAYER_DROPOUT = {"native": "Tensor? dropout_scale", "triton": "Tensor? dropout_seed"}
_LAYER_OPTIONS = {
    "native": "str act, SymInt patch_h, SymInt patch_w",
    "triton": "float dropout_p, str act, SymInt patch_h, SymInt patch_w",
}

# What the native forward pass keeps besides: an option, a result, a tensor that backward takes.
_LAYER_KEPT = {
    "native": (", bool for_backward", ", Tensor values", ", Tensor values"),
    "triton": ("", "", ""),
}
_LAYER_FAKE: dict[str, Callable[..., Any]] = {
    "native": _separable_attention_native_fake,
    "triton": _separable_attention_fake,
}

_POOL_AND_GATE = ("context_pool", "context_pool_backward", "gate", "gate_backward")
_LAYER = (
    "separable_attention",
    "separable_attention_inference",
    "separable_attention_backward",
)

for _backend in ("native", "triton"):
    _define(f"context_pool_{_backend}", _CONTEXT_POOL, _context_pool_fake)
    _define(
        f"context_pool_backward_{_backend}", _CONTEXT_POOL_BACKWARD, _context_pool_backward_fake
    )
    _differentiate(f"context_pool_{_backend}", _context_pool_setup, _context_pool_formula(_backend))
    _refuse_double_backward(f"context_pool_backward_{_backend}")

    _define(f"gate_{_backend}", _GATE, _gate_fake)
    _define(f"gate_backward_{_backend}", _GATE_BACKWARD, _gate_backward_fake)
    _differentiate(f"gate_{_backend}", _gate_setup, _gate_formula(_backend))
    _refuse_double_backward(f"gate_backward_{_backend}")

    dropout, options = _LAYER_DROPOUT[_backend], _LAYER_OPTIONS[_backend]
    option, result, saved = _LAYER_KEPT[_backend]
    _define(
        f"separable_attention_{_backend}",
        f"({_LAYER_TENSORS}, {dropout}, {options}{option})"
        f" -> (Tensor out, Tensor weights, Tensor statistics{result})",
        _LAYER_FAKE[_backend],
    )
    _define(
        f"separable_attention_inference_{_backend}",
        f"({_LAYER_TENSORS}, {dropout}, {options}) -> Tensor",
        _separable_attention_inference_fake,
    )
    torch.library.register_autograd(
        f"sep_attn::separable_attention_inference_{_backend}",
        _inference_formula(_backend),
        setup_context=_inference_setup,
        lib=_library,
    )
    _define(
        f"separable_attention_backward_{_backend}",
        f"({_LAYER_BACKWARD_TENSORS}, {dropout}, Tensor weights, Tensor statistics{saved},"
        f" {options}, {_LAYER_NEEDS}) -> {_LAYER_GRADIENTS}",
        _separable_attention_backward_fake,
    )
    _differentiate(
        f"separable_attention_{_backend}",
        _separable_attention_setup,
        _separable_attention_formula(_backend),
    )
    _refuse_double_backward(f"separable_attention_backward_{_backend}")

_define("separable_attention_packed_native", _LAYER_PACKED, _separable_attention_packed_fake)

for _name in (*_POOL_AND_GATE, *_LAYER):
    _serve_with_triton(f"{_name}_triton", getattr(triton_kernels, _name))


_OPERATORS: dict[tuple[str, str], Any] = {
    (name, backend): getattr(torch.ops.sep_attn, f"{name}_{backend}").default
    for backend in ("native", "triton")
    for name in (*_POOL_AND_GATE, *_LAYER)
}
_OPERATORS["separable_attention_packed", "native"] = (
    torch.ops.sep_attn.separable_attention_packed_native.default
)


def _inference_in_pooled_form(*arguments: Any) -> Tensor:
    out, *_ = _POOLED_FORMS["separable_attention"](*arguments, False)
    return out


_POOLED_FORMS: dict[str, Any] = {
    "context_pool": pooled.context_pool,
    "gate": pooled.gate,
    "separable_attention": pooled.separable_attention,
    "separable_attention_inference": _inference_in_pooled_form,
    "separable_attention_packed": pooled.separable_attention_packed,
}


def _with_seed(name: str) -> Callable[..., Any]:
    """A pooled form with the dropout of the Triton operators, and nothing kept for backward."""

    def with_seed(*arguments: Any) -> Any:
        *tensors, key_padding_mask, seed, dropout_p, act, patch_h, patch_w = arguments
        source = tensors[0] if tensors[1] is None else tensors[1]
        scale = None if seed is None else reference.dropout_scale(source, dropout_p)
        options = (*tensors, key_padding_mask, scale, act, patch_h, patch_w)
        if name == "separable_attention_inference":
            return _POOLED_FORMS[name](*options)
        return _POOLED_FORMS["separable_attention"](*options, False)[:3]

    return with_seed


DECOMPOSITIONS = {
    operator: _with_seed(name) if backend == "triton" and name in _LAYER else _POOLED_FORMS[name]
    for (name, backend), operator in _OPERATORS.items()
    if name in _POOLED_FORMS
}
_OPERATORS |= {(name, "pooled"): function for name, function in _POOLED_FORMS.items()}


def _operator(name: str, backend: str) -> Any:
    return _OPERATORS[name, backend]


def context_pool(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _call("context_pool", backend, args)


def gate(backend: str, *args: Any) -> Tensor:
    return _call("gate", backend, args)


def separable_attention(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _call("separable_attention", backend, args)


# The calls that come here are the shortest: not even OpOverload.__call__ stands between.
separable_attention_packed = _operator("separable_attention_packed", "native")._op

# ``separable_attention`` where nothing is optional but the biases: what the general formulas ask of
# every argument costs as much as a small layer's kernels.


# What a call of an operator raises where it does not take the arguments: ranks, the patch and the
# kernels' own checks; and PyTorch's, for what is no tensor, for devices, or where no kernels are.
REFUSALS = (IndexError, TypeError, ValueError, RuntimeError)


class Refused(Exception):
    """One of ``REFUSALS``."""


def _self_attention_function(
    backend: str,
    forward_call: Callable[..., Any],
    backward_call: Callable[..., Any],
    *last_arguments: bool,
    refusals: tuple[type[Exception], ...] = (),
) -> Callable[..., Tensor]:
    """Both calls take what the operators of the backend take, and then any options beyond theirs;
    ``last_arguments`` only the first. What that raises of ``refusals`` becomes :class:`Refused`,
    which no hook on saved tensors raises."""
    operator = _operator("separable_attention_backward", backend)
    operator_options = _LAYER_OPTIONS[backend].count(",") + 1

    class SelfAttention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            qkv_weight: Tensor,
            qkv_bias: Tensor | None,
            out_weight: Tensor,
            out_bias: Tensor | None,
            *options: Any,
        ) -> Tensor:
            tensors = (x, None, qkv_weight, qkv_bias, out_weight, out_bias, None, None)
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    out, *kept = forward_call(*tensors, *options, *last_arguments)
            except refusals as error:
                raise Refused from error
            ctx.options = options
            ctx.save_for_backward(x, qkv_weight, qkv_bias, out_weight, *kept)
            return out

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
            x, qkv_weight, qkv_bias, out_weight, *kept = ctx.saved_tensors
            needed = ctx.needs_input_grad
            options, further = ctx.options[:operator_options], ctx.options[operator_options:]
            tensors = (grad_out, None, x, None, qkv_weight, qkv_bias, out_weight, None, *kept)
            needs = needed[0], True in needed[1:]
            _refuse_tangents((grad_out,))
            if torch.is_grad_enabled():  # for a second derivative, which the operator refuses
                grads = operator(*tensors, *options, *needs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    grads = backward_call(*tensors, *options, *needs, *further)
            grad_x, _, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias = grads
            return (
                grad_x if needed[0] else None,
                _shaped_as(qkv_weight, grad_qkv_weight) if needed[1] else None,
                grad_qkv_bias if needed[2] else None,
                _shaped_as(out_weight, grad_out_weight) if needed[3] else None,
                grad_out_bias if needed[4] else None,
                *(None,) * len(ctx.options),
            )

    apply: Callable[..., Tensor] = SelfAttention.apply
    return apply


def _launch_backward(grad_out: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Triton's launcher at once, unless an operator is looked for, or is to make of the gradient
    one that lies in memory: vmap hides a batch in it, complex numbers leave it to be negated."""
    *of_operator, known = others
    if is_observed() or not has_memory(grad_out):
        return _operator("separable_attention_backward", "triton")(grad_out, *of_operator)
    return triton_kernels.separable_attention_backward(grad_out, *of_operator, known)


def _shaped_as(weight: Tensor, grad: Tensor) -> Tensor:
    return grad if weight.dim() == 2 else grad.view(weight.shape)  # that of a 1 x 1 convolution


# x, qkv_weight, qkv_bias, out_weight, out_bias, act, patch_h, patch_w -> out
native_self_attention = _self_attention_function(
    "native",
    _operator("separable_attention", "native")._op,
    _operator("separable_attention_backward", "native")._op,
    True,  # for_backward
    refusals=REFUSALS,
)
# The same, with dropout_p, which is 0.0, before act, and last what the launchers keep; weights are
# matrices.
triton_self_attention = _self_attention_function(
    "triton", triton_kernels.separable_attention, _launch_backward
)


def separable_attention_inference(backend: str, *args: Any) -> Tensor:
    """The output alone, without the way through Python that a differentiable operator takes."""
    operator = _operator("separable_attention_inference", backend)
    if torch.compiler.is_compiling() or is_transformed():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
