"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process's place among its peers.

    What the processes tell one another about the run goes between the hosts, by gloo: the devices'
    queues of work do not take part, and nothing waits for them."""

    rank: int
    world: int
    device: torch.device
    group: Any = field(default=None, repr=False)
    """Of the hosts; None where there is one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function returns or raises on the main process, on every process."""
        if self.world == 1:
            return function()
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every process's value, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on any process."""
        if self.world == 1:
            return flags
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(value) for value in values.tolist())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, by the devices."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def first_difference(self, tensors: Iterable[torch.Tensor]) -> int | None:
        """Which of the tensors, fp32 and of equal shapes on all processes, is the first whose bits are not
        the same everywhere, by the sums of the bit patterns; None where all agree. Waits for the device."""
        if self.world == 1:
            return None
        sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
        found = self.gather(torch.stack(sums).tolist())
        return next(
            (i for i, each in enumerate(zip(*found, strict=True)) if len({*each}) > 1), None
        )

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)


def pick_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one. ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: must be cpu, cuda, cuda:N or auto, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but torch sees no CUDA device")
    return device


def join(device: str = "auto") -> Workers:
    """Join the process group that torchrun announces in the environment (nccl between GPUs, gloo between
    CPUs)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device)
    if world == 1:
        return Workers(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        fresh = dist.PrefixStore(agree_on_a_start(store, rank, world), store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world)
    return Workers(dist.get_rank(), dist.get_world_size(), chosen, _host_group())


def agree_on_a_start(store: Any, rank: int, world: int, patience: float = 1800.0) -> str:
    """A name that the processes of this start have in common, and no earlier start had.

    torchrun keeps one store through all its restarts (pytorch issue 135712): what a killed process left
    there, such as the address it listened at, would be taken for its successor's. Restarts are counted by
    each host for itself, so that the count is no such name. Here rank 0 names the start and the others
    sign under that name; one who signed under a dead rank 0's does not find its own signature in the list
    that was closed, and looks again. TimeoutError after `patience` seconds."""
    own = uuid.uuid4().hex
    end = time.monotonic() + patience
    if rank == 0:
        store.set("start", own)
    while time.monotonic() < end:
        if rank == 0:
            signed = [f"{own}/{other}" for other in range(1, world)]
            if store.check(signed):
                store.set(f"{own}/all", b",".join(store.get(key) for key in signed))
                return own
        elif store.check(["start"]):
            start = store.get("start").decode()
            store.set(f"{start}/{rank}", own)
            if store.check([f"{start}/all"]) and own in store.get(f"{start}/all").decode():
                return start
        time.sleep(0.02)
    raise TimeoutError(
        f"join: rank {rank} of {world} waited {patience:g} s for the others to start; is "
        f"each of them running, and with the same MASTER_ADDR and MASTER_PORT?"
    )


_host_groups: dict[int, Any] = {}


def _host_group() -> Any:
    """The gloo group beside the devices' one, made once."""
    key = id(dist.group.WORLD)
    if key not in _host_groups:
        _host_groups[key] = dist.new_group(backend="gloo")
    return _host_groups[key]
