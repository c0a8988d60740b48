"""DDP and FSDP2 over two processes: the gradients of one process, and eval after a step."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sep_attn import SeparableAttention

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
PROCESSES = 2
BATCH, TOKENS, DIM = 4, 7, 12  # qkv_proj has 25 rows, which two processes share unevenly


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = SeparableAttention(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(DIM, 3))


def make_tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 shards; a copy."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def two_steps(model: nn.Module, x: Tensor, everything: Tensor) -> dict[str, Tensor]:
    """Gradients of two steps with eval after the first, whose packed weights must not stay."""
    results = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in (1, 2):
        model.train()
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            results[f"step {step}, {name.removeprefix('module.')}"] = whole(parameter.grad)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            results[f"step {step}, eval"] = model(everything).clone()
    return results


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
}


def work(rank: int, folder: Path) -> None:
    """One of the processes: its share of the batch, under both wrappers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=200),
    )
    try:
        x = make_tokens()
        mine = x.chunk(PROCESSES)[rank]
        results = {name: two_steps(wrap(make_model()), mine, x) for name, wrap in WRAPPERS.items()}
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process found; both wrappers in the same two processes, which start slowly."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(work, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_give_the_gradients_of_one(
    wrapper: str, results: list[dict[str, dict[str, Tensor]]]
) -> None:
    x = make_tokens()
    exact = two_steps(make_model().double(), x.double(), x.double())
    for process in results:
        assert process[wrapper].keys() == exact.keys()
        for name, found in process[wrapper].items():
            # Half a batch each, then summed, rounds otherwise than one process, but no further.
            scale = exact[name].abs().max().clamp(min=1e-2)
            assert (found - exact[name]).abs().max() <= 1e-5 * scale, name
    first, second = (process[wrapper] for process in results)
    for name in exact:
        assert torch.equal(first[name], second[name]), name


def test_the_gradients_tell_a_process_that_did_not_take_part() -> None:
    """Half the batch alone is far from the whole, so agreement above says something."""
    x = make_tokens()
    exact, half = (two_steps(make_model(), part, x) for part in (x, x[:2]))
    name = "step 1, 0.attention.qkv_proj.weight"
    assert (exact[name] - half[name]).abs().max() > 0.05 * exact[name].abs().max()
