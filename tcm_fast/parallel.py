"""Several processes, one training step: weights whole in each (DistributedDataParallel) or in parts (FSDP2).

Either way the gradient of a step is that of one process alone, up to the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tcm_fast.kernels.normalized_copy import normalized_rows
from tcm_fast.networks import Precond
from tcm_fast.networks.mp_layers import MPConv
from tcm_fast.tensor_files import Tensors

COMPRESS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def replicate(
    objective: nn.Module, device: torch.device, gradient_dtype: str
) -> DistributedDataParallel:
    """Weights whole in every process; gradients lie in the buckets that are exchanged, in fp32 or in 16
    bits."""
    wrapped = DistributedDataParallel(
        objective,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )
    if gradient_dtype != "fp32":
        wrapped.register_comm_hook(None, COMPRESS[gradient_dtype])
    return wrapped


class Shards:
    """A network whose weights lie in parts on the processes, and those parts as plain parameters: an
    optimizer, averages and 16-bit moments work on them as on whole ones.

    Rows stay whole (the first dimension is cut), so what is normalised by rows is, by each process for
    its own. Single numbers and what lies beside the raw network are whole everywhere.

    Args:
        net: the network, on the device or the CPU, with equal weights everywhere; it is cut in place.
        device: where the parts shall lie.
    """

    def __init__(self, net: Precond, device: torch.device) -> None:
        self.whole = copy.deepcopy(net).to("meta")
        marks = [vars(p) for p in net.parameters()]  # such as how an optimizer shall treat them
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.net = shard(net, self.mesh).to(device)
        self.names = [name for name, _ in net.named_parameters()]
        self.parts = [_part(p, m) for p, m in zip(net.parameters(), marks, strict=True)]

    def take_gradients(
        self, scale: torch.Tensor | float = 1.0, max_norm: float | None = None
    ) -> torch.Tensor:
        """Give the parts their gradients, clipped to a norm over all processes, and return that norm,
        fp64 on the device. Where one process has a gradient that is not finite, all get one.

        Args:
            scale: the loss scale, by which the gradients are still multiplied.
            max_norm: None does not clip.
        """
        cut: list[torch.Tensor] = []
        whole: list[torch.Tensor] = []
        for part, parameter in zip(self.parts, self.net.parameters(), strict=True):
            part.grad = None if parameter.grad is None else _local(parameter.grad)
            if part.grad is not None:
                (cut if isinstance(parameter, DTensor) else whole).append(part.grad)
        self._average(whole)
        total = _square(cut)
        dist.all_reduce(total)
        norm = (total + _square(whole)).sqrt() / scale if whole else total.sqrt() / scale
        factor = 1 + 0 * norm
        if max_norm is not None:
            factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(cut + whole, factor.float())
        return norm

    def _average(self, grads: list[torch.Tensor]) -> None:
        """The mean over the processes, in place, as FSDP gives it for what is cut."""
        if not grads:
            return
        joined = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        parts = joined.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [p.view(g.shape) for p, g in zip(parts, grads, strict=True)])

    @torch.no_grad()
    def force_rows(self) -> None:
        """`networks.force_rows` of the parts: each process has whole rows."""
        for module in self.net.modules():
            if isinstance(module, MPConv):
                rows = _local(module.weight)
                if len(rows):
                    rows.copy_(normalized_rows(rows))

    def drop_gradients(self) -> None:
        """Free the gradients, of the network and of the parts."""
        for tensor in (*self.parts, *self.net.parameters()):
            tensor.grad = None

    def reshard(self) -> None:
        """Take the weights apart again after a forward pass without a backward one."""
        cast(FSDPModule, self.net.model).reshard()

    def gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors on every process, from parts like the parameters'. All processes have to call
        it."""
        return [
            DTensor.from_local(
                part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            ).full_tensor()
            if isinstance(p, DTensor)
            else part
            for part, p in zip(parts, self.net.parameters(), strict=True)
        ]

    def part_of(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """This process's part of a tensor like parameter `index`, which all processes hold."""
        parameter = list(self.net.parameters())[index]
        whole = whole.to(torch.device(self.mesh.device_type))
        if not isinstance(parameter, DTensor):
            return whole
        cut = distribute_tensor(whole, self.mesh, parameter.placements, src_data_rank=None)
        return cut.to_local()

    def assembled(self, parts: Sequence[torch.Tensor], device: torch.device | str) -> Precond:
        """A whole network with these weights, on every process."""
        net = copy.deepcopy(self.whole).to_empty(device=device)
        for name, buffer in self.net.named_buffers():
            net.get_buffer(name).copy_(buffer)
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), self.gather(parts), strict=True):
                parameter.copy_(value)
        return net

    def gather_state(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """The optimizer's state as `optimizer_state.flatten_optimizer` gives that of whole parameters."""
        keys = sorted({key for part in self.parts for key in optimizer.state.get(part, {})})
        found: dict[str, Any] = {}
        for key in keys:
            values = [optimizer.state[part][key] for part in self.parts]
            whole = values if key == "step" else self.gather(values)
            found |= {f"{name}/{key}": v for name, v in zip(self.names, whole, strict=True)}
        return found

    def cut_state(self, state: Tensors) -> Tensors:
        """This process's part of what `gather_state` gave."""
        place = {name: index for index, name in enumerate(self.names)}
        return {
            path: value
            if path.endswith("/step")
            else self.part_of(value, place[path.rpartition("/")[0]])
            for path, value in state.items()
        }


def shard(net: Precond, mesh: DeviceMesh) -> Precond:
    """Cut a network's weights over the processes of a mesh, in place: those of a block come together
    when it runs. Single numbers cannot be cut."""
    model = net.model
    single = {p for p in model.parameters() if p.ndim == 0}
    for blocks in (model.enc, model.dec):
        for block in cast(nn.ModuleDict, blocks).values():
            if any(p not in single for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=single)
    fully_shard(model, mesh=mesh, ignored_params=single)
    return net


def _part(parameter: nn.Parameter, marks: dict[str, Any]) -> nn.Parameter:
    """This process's part, in the same memory."""
    part = nn.Parameter(_local(parameter.detach()), requires_grad=parameter.requires_grad)
    for key, value in marks.items():
        setattr(part, key, value)
    return part


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares over tensors, fp64 scalar."""
    return torch.stack([norm.double().square() for norm in torch._foreach_norm(tensors)]).sum()
