# Addresses are tensor.data_ptr(), contiguous; `sample` is int64 [n]; seed and step are addresses of
# int64 scalars. The *_cuda functions exist where has_cuda(); their addresses are the device's. Tables
# and options of an optimizer step are as csrc/fused_step.h lays them out.

from collections.abc import Sequence

SOURCES: str  # hash of csrc/ that it was built from
FUSED_STEP_CHUNK: int

def has_cuda() -> bool: ...
def cuda_archs() -> list[str]: ...
def is_debug() -> bool: ...
def cuda_runtime_version() -> int: ...
def cuda_driver_version() -> int: ...
def philox_bits_cpu(
    out: int, sample: int, n: int, num_blocks: int, seed: int, step: int, layer: int, threads: int
) -> None: ...
def philox_normal_cpu(
    out: int, sample: int, n: int, elements: int, seed: int, step: int, layer: int, threads: int
) -> None: ...
def dropout_mask_cpu(
    out: int,
    sample: int,
    n: int,
    elements: int,
    seed: int,
    step: int,
    layer: int,
    threshold: int,
    threads: int,
) -> None: ...
def dropout_cpu(
    out: int,
    x: int,
    sample: int,
    n: int,
    channels: int,
    pixels: int,
    channels_last: bool,
    seed: int,
    step: int,
    layer: int,
    threshold: int,
    threads: int,
) -> None: ...
def group_norm_silu_fwd_cpu(
    y: int,
    x: int,
    weight: int,
    bias: int,
    add: int,
    scale: int,
    shift: int,
    mean: int,
    rstd: int,
    n: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
    silu: bool,
    sample: int,
    seed: int,
    step: int,
    layer: int,
    threshold: int,
    threads: int,
) -> None: ...
def group_norm_silu_bwd_cpu(
    grad_y: int,
    grad_past: int,
    grad_x: int,
    grad_affine: int,
    grad_add: int,
    grad_scale: int,
    grad_shift: int,
    x: int,
    weight: int,
    bias: int,
    add: int,
    scale: int,
    shift: int,
    mean: int,
    rstd: int,
    n: int,
    channels: int,
    pixels: int,
    groups: int,
    silu: bool,
    sample: int,
    seed: int,
    step: int,
    layer: int,
    threshold: int,
    threads: int,
) -> None: ...
def philox_bits_cuda(
    out: int, sample: int, n: int, num_blocks: int, seed: int, step: int, layer: int, stream: int
) -> None: ...
def philox_normal_cuda(
    out: int, sample: int, n: int, elements: int, seed: int, step: int, layer: int, stream: int
) -> None: ...
def dropout_mask_cuda(
    out: int,
    sample: int,
    n: int,
    elements: int,
    seed: int,
    step: int,
    layer: int,
    threshold: int,
    stream: int,
) -> None: ...
def fused_step_check(table: int, tensors: int, averages: int, groups: int) -> None: ...
def fused_step_cpu(
    table: int,
    tensors: int,
    averages: int,
    options: int,
    groups: int,
    norm: int,
    skips: int,
    scale: int,
    tracker: int,
    threads: int,
) -> None: ...
def fused_step_scratch(tensors: int, num_chunks: int) -> int: ...
def fused_step_cuda(
    table: int,
    tensors: int,
    averages: int,
    chunks: int,
    num_chunks: int,
    num_rows: int,
    longest: int,
    options: int,
    groups: int,
    norm: int,
    skips: int,
    scale: int,
    tracker: int,
    scratch: int,
    scratch_size: int,
    eight: bool,
    stream: int,
) -> None: ...
def store_options_cuda(to: int, values: Sequence[float], stream: int) -> None: ...
