"""Several processes, one training step, by DistributedDataParallel: its gradient is that of one process
alone, up to the order of sums."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

COMPRESS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def replicate(
    objective: nn.Module, device: torch.device, gradient_dtype: str
) -> DistributedDataParallel:
    """The objective with all its weights in every process; gradients lie in the buckets that are exchanged,
    in fp32 or in 16 bits."""
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
