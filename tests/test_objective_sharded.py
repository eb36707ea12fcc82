"""The objective under FSDP2: two processes on shards equal one on the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast import chunks
from holdfast.divergence import Divergence
from holdfast.objective import DenseBase, Head, token_losses

WORLD = 2


class Tiny(torch.nn.Module):
    """A body and a head, of which only the body is called."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = torch.nn.Linear(6, 6)
            self.out = torch.nn.Linear(6, 20)
        self.out.requires_grad_(trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.body(x)
        return hidden


def sharded_case(rank: int) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(rank)
    x, base = torch.randn(7, 6, generator=random), torch.randn(7, 6, generator=random)
    kl = torch.arange(7) > 3
    return x, DenseBase(base[kl], Head(torch.ones(20, 6) / 5)), torch.arange(7) + rank, kl


def sharded_loss(
    model: Any, rank: int, told: tuple[float, float] | None = None, own: bool = False
) -> torch.Tensor:
    """`told`: what an NLL and a KL are said to weigh; `own`: the base has the model's head."""
    x, base, targets, kl = sharded_case(rank)
    hidden = model(x)  # before the head is looked at, as the trainer does
    head = Head(model.out.weight, model.out.bias)
    base = DenseBase(base.hidden_MH, head) if own else base
    weights = told and {
        "nll_weight": torch.full((4,), told[0]),
        "kl_weight": torch.full((3,), told[1]),
    }
    nll, kls = token_losses(
        hidden,
        head,
        targets,
        nll_N=~kl,
        kl_N=kl,
        base=base,
        divergence=Divergence(),
        **(weights or {}),
    )
    return nll.mean() + 3 * kls.mean()


def compare(
    rank: int, trained: bool, way: str, told: tuple[float, float] | None, own: bool
) -> None:
    """Gradients of the sharded model against the mean of both processes' on the whole one."""
    whole = Tiny(trained)
    losses = [sharded_loss(whole, r, own=own) for r in range(WORLD)]
    (sum(losses) / WORLD).backward()  # type: ignore[union-attr]
    model = Tiny(trained)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    if way == "head apart":
        fully_shard(model.out, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=way != "kept whole")
    gathers = 0
    gather = DTensor.full_tensor

    def counted(self: Any, **kwargs: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return gather(self, **kwargs)

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    try:
        loss = sharded_loss(model, rank, told, own)
        loss.backward()
    finally:
        DTensor.full_tensor = gather  # type: ignore[method-assign]
    assert gathers == (0 if way == "kept whole" else 2), "weight and bias, once a pass"
    torch.testing.assert_close(loss, losses[rank])
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).grad
        if expected is None:
            assert parameter.grad is None, name
        else:
            assert isinstance(parameter.grad, DTensor), name
            torch.testing.assert_close(parameter.grad.full_tensor(), expected)


def process(rank: int, folder: str) -> None:
    chunks.CPU_CHUNK_BYTES = 4 * 20 * 2  # two rows a chunk
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    for trained in (False, True):
        for way in ("kept whole", "resharded", "head apart"):
            for told in (None, (1 / 8, 1 / 2), (1.0, 1.0)):  # nothing, right, wrong
                compare(rank, trained, way, told, own=False)
            compare(rank, trained, way, None, own=True)
    dist.destroy_process_group()


def test_two_processes_on_shards_equal_one_on_the_whole(tmp_path: Path) -> None:
    """Head frozen and trained; left whole after forward, resharded, and in a group of its own."""
    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
        process, args=(str(tmp_path),), nprocs=WORLD
    )
