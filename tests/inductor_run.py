"""Programs of ``torch.compile`` run without a GPU: Inductor's kernels and the package's, as PTX.

As a script it compiles a layer between two neighbours with a symbolic number of tokens, runs it
forward and backward, and forward again for another length, and prints one JSON object: the
launches, how far each result is from float64 and how far plain PyTorch is, and what each of the
package's kernels takes of a GPU.
Needs ``TRITON_INTERPRET`` unset.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from inductor_trace import as_on_a_gpu
from oracle import distance
from ptx.inductor import running_programs

from benchmarks.machine_code import TARGET, TARGETS, resources
from sep_attn import SeparableAttention

DIM = 128
LENGTHS = (520, 513)  # too long for one launch, with ragged ends


class Block(nn.Module):
    """A scale, the layer and the sum with the input."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(DIM))
        self.layer = SeparableAttention(DIM, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale) + x


def results(
    block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, backward: bool
) -> dict[str, Tensor]:
    """Output, and gradients, of a call of the block, which may be compiled."""
    x = x.detach().requires_grad_()
    out = call(x)
    if not backward:
        return {"out": out.detach()}
    direction = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16().to(out.dtype)
    leaves = {"x": x, **dict(block.named_parameters())}
    grads = torch.autograd.grad((out * direction).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    block = Block("triton").bfloat16()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=DIM**-0.5 if parameter.ndim == 2 else 0.5)
    plain = copy.deepcopy(block)
    plain.layer.backend = "reference"
    exact = copy.deepcopy(plain).double()
    errors = {}
    with as_on_a_gpu(), running_programs() as (kernels, ran):
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        for length in LENGTHS:
            x = torch.randn(1, length, DIM, dtype=torch.bfloat16)
            backward = length == LENGTHS[0]
            found = results(block, compiled, x, backward)
            usual = results(plain, plain, x, backward)
            expected = results(exact, exact, x.double(), backward)
            for name, value in expected.items():
                errors[f"{length} {name}"] = (
                    distance(found[name], value),
                    distance(usual[name], value),
                )
    ours = [kernel for kernel in kernels if kernel.is_ours]
    row = {
        "launched": [launch.kernel for launch in ran],
        "errors": errors,
        "compiled": [
            {"kernel": kernel.name, **resources(kernel.compiled, TARGETS[TARGET])}
            for kernel in ours
        ],
    }
    print(json.dumps(row, default=str))


if __name__ == "__main__":
    main()
