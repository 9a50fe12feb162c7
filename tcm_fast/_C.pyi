# Addresses are tensor.data_ptr(), contiguous; `sample` is int64 [n]. The *_cuda functions exist where
# has_cuda(); their seed and step are addresses of int64 scalars on the device.

def has_cuda() -> bool: ...
def cuda_archs() -> list[str]: ...
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
