"""Counter-based random numbers: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) and unit Gaussians made from it by Box-Muller.

The counter is (block, sample, step low, step high), the key (seed, layer): a number depends on these
alone, not on the batch, layout or device that it is computed in. The Gaussians use only products, sums
and square roots that are correctly rounded everywhere, so that they too agree bit for bit.
"""

import math

import torch

from tcm_fast.kernels._backend import extension_for

# -- reference ------------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF
# -2 log1p(-f)/f on [0, 1/2]; sin(πs/4)/s and cos(πs/4) in s² on [0, 1]: near-minimax, 6e-9 or better.
_LOGARITHM = (
    *(2.0, 1.00000238, 0.666510344, 0.503913581, 0.350881547),
    *(0.681492925, -1.18017745, 3.91974115, -4.91792393, 3.46722388),
)
_SINE = (0.785398185, -0.0807454363, 0.00249000685, -3.59542901e-05)
_COSINE = (1.0, -0.308425128, 0.0158543251, -0.000325938599, 3.52979714e-06)


def _high_product(a: int, b: torch.Tensor) -> torch.Tensor:
    """The high 32 bits of a·b, both below 2**32."""
    return (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...], rounds: int = 7
) -> torch.Tensor:
    """Four counter words and two key words, int64 below 2**32 -> words int64 [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _high_product(0xD2511F53, c0), (0xD2511F53 * c0) & _LOW
        high1, low1 = _high_product(0xCD9E8D57, c2), (0xCD9E8D57 * c2) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def philox_words_reference(
    sample: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, layer: int, num_blocks: int
) -> torch.Tensor:
    """-> int64 [N, num_blocks, 4], each below 2**32."""
    block = torch.arange(num_blocks, device=sample.device).expand(len(sample), num_blocks)
    counter = (block, (sample & _LOW)[:, None], step & _LOW, (step >> 32) & _LOW)
    return philox4x32(counter, (seed & _LOW, torch.full_like(seed, layer)))


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    y = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        y = y * x + coefficient
    return y


def box_muller_reference(radius_word: torch.Tensor, angle_word: torch.Tensor) -> torch.Tensor:
    """sqrt(-2 ln u(radius_word)) · (cos, sin)(2π u(angle_word)), u(w) = ((w>>8) + 1/2)·2^-24:
    words int64 -> fp32 [..., 2]."""
    # u = m·2^-25, m odd; m·2^j lies in [2^24, 2^25), so -ln u = j·ln 2 - log1p(-f), f in (0, 1/2].
    m = 2 * (radius_word >> 8) + 1
    j = 25 - torch.frexp(m.to(torch.float64)).exponent
    f = (2**25 - (m << j)).to(torch.float32) * 2.0**-25
    square = j.to(torch.float32) * 1.38629436 + f * _polynomial(f, _LOGARITHM)
    # torch's fp32 root may be off by the last bit; rounding the fp64 one is exact.
    radius = square.to(torch.float64).sqrt().to(torch.float32)

    # The angle is `quarter` quarter turns and s/8 of a turn, s in (-1, 1).
    m = 2 * (angle_word >> 8) + 1
    quarter = (m + 2**22) >> 23
    s = (m - (quarter << 23)).to(torch.float32) * 2.0**-22
    sine, cosine = s * _polynomial(s * s, _SINE), _polynomial(s * s, _COSINE)
    odd = (quarter & 1) == 1
    x, y = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    sign = 1.0 - (quarter & 2).to(torch.float32)
    return torch.stack([radius * (sign * x), radius * (sign * y)], -1)


def philox_normal_reference(
    sample: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, layer: int, elements: int
) -> torch.Tensor:
    """-> fp32 [N, elements]: words 0, 1 of block b give elements 4b, 4b+1; words 2, 3 the next two."""
    words = philox_words_reference(sample, seed, step, layer, -(-elements // 4))
    return box_muller_reference(words[..., 0::2], words[..., 1::2]).flatten(1)[:, :elements]


# -- launchers ------------------------------------------------------------------------------------


def launch(name, ext, out, sample, sizes, seed, step, layer, *rest, inputs=()) -> torch.Tensor:
    """Calls `name`_cpu or _cuda of the extension: addresses of `out` and `inputs`, then the sizes."""
    sample = sample.contiguous()
    pointers = [t.data_ptr() for t in (out, *inputs, sample)]
    arguments = (*pointers, len(sample), *sizes, seed.data_ptr(), step.data_ptr(), layer, *rest)
    if out.device.type == "cpu":
        getattr(ext, f"{name}_cpu")(*arguments, torch.get_num_threads())
        return out
    with torch.cuda.device(out.device):
        getattr(ext, f"{name}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
    return out


# -- registration ---------------------------------------------------------------------------------

torch.library.define(
    "tcm_fast::philox_bits",
    "(Tensor sample, Tensor seed, Tensor step, int layer, SymInt num_blocks) -> Tensor",
)
torch.library.define(
    "tcm_fast::philox_normal",
    "(Tensor sample, Tensor seed, Tensor step, int layer, SymInt elements) -> Tensor",
)


@torch.library.impl("tcm_fast::philox_bits", "CompositeExplicitAutograd")
def _philox_bits(sample, seed, step, layer, num_blocks):
    ext = extension_for("philox_bits", sample.device)
    if ext is None:
        words = philox_words_reference(sample, seed, step, layer, num_blocks)
        return torch.where(words > 0x7FFFFFFF, words - 2**32, words).to(torch.int32)
    out = torch.empty((len(sample), num_blocks, 4), dtype=torch.int32, device=sample.device)
    return launch("philox_bits", ext, out, sample, (num_blocks,), seed, step, layer)


@torch.library.register_fake("tcm_fast::philox_bits")
def _(sample, seed, step, layer, num_blocks):
    return sample.new_empty((sample.shape[0], num_blocks, 4), dtype=torch.int32)


@torch.library.impl("tcm_fast::philox_normal", "CompositeExplicitAutograd")
def _philox_normal(sample, seed, step, layer, elements):
    ext = extension_for("philox_normal", sample.device)
    if ext is None:
        return philox_normal_reference(sample, seed, step, layer, elements).contiguous()
    out = torch.empty((len(sample), elements), dtype=torch.float32, device=sample.device)
    return launch("philox_normal", ext, out, sample, (elements,), seed, step, layer)


@torch.library.register_fake("tcm_fast::philox_normal")
def _(sample, seed, step, layer, elements):
    return sample.new_empty((sample.shape[0], elements), dtype=torch.float32)


# -- public functions -----------------------------------------------------------------------------


def scalar(name: str, what: str, value, bits: int, device: torch.device) -> torch.Tensor:
    """An int or a 0-dim int64 tensor as a 0-dim int64 tensor on `device`."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64 or value.ndim != 0:
            raise ValueError(
                f"{name}: {what} must be an int or a 0-dim int64 tensor, "
                f"got {value.dtype} {list(value.shape)}"
            )
        return value.to(device, non_blocking=True)
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name}: {what} must be in [0, 2**{bits}), got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def counters(name: str, seed, step, layer: int, sample: torch.Tensor):
    """(sample, seed, step, layer) as the operations take them, checked."""
    if sample.dtype != torch.int64 or sample.ndim != 1:
        raise ValueError(
            f"{name}: sample must be int64 [N], got {sample.dtype} {list(sample.shape)}"
        )
    if not 0 <= layer < 2**32:
        raise ValueError(f"{name}: layer must be in [0, 2**32), got {layer}")
    seed = scalar(name, "seed", seed, 32, sample.device)
    return sample, seed, scalar(name, "step", step, 63, sample.device), layer


def philox_bits(
    seed: int | torch.Tensor,
    step: int | torch.Tensor,
    layer: int,
    sample: torch.Tensor,
    num_blocks: int,
) -> torch.Tensor:
    """The words of Philox4x32-7 as int32 bit patterns [N, num_blocks, 4].

    Args:
        seed: below 2**32, an int or a 0-dim int64 tensor (of which the low 32 bits count).
        step: below 2**63, an int or a 0-dim int64 tensor.
        layer: below 2**32.
        sample: int64 [N], numbers below 2**32; the result is on their device.
        num_blocks: blocks of four words per sample.

    Raises:
        ValueError: a value out of range, a wrong dtype or shape.
    """
    if num_blocks < 0:
        raise ValueError(f"philox_bits: num_blocks must not be negative, got {num_blocks}")
    arguments = counters("philox_bits", seed, step, layer, sample)
    return torch.ops.tcm_fast.philox_bits(*arguments, num_blocks)


def philox_normal(
    seed: int | torch.Tensor,
    step: int | torch.Tensor,
    layer: int,
    sample: torch.Tensor,
    shape: tuple[int, int, int],
) -> torch.Tensor:
    """Unit Gaussians fp32 [N,C,H,W] in channels_last memory, equal bit for bit in every batch and on
    every device.

    Element e = (h·W+w)·C+c of a sample comes from word e%4 of its block e//4 and that word's
    neighbour: words (0, 1) make elements 0 (cosine) and 1 (sine), words (2, 3) elements 2 and 3.

    Args:
        seed: below 2**32, an int or a 0-dim int64 tensor (of which the low 32 bits count).
        step: below 2**63, an int or a 0-dim int64 tensor.
        layer: below 2**32.
        sample: int64 [N], numbers below 2**32; the result is on their device.
        shape: (C, H, W).

    Raises:
        ValueError: a value out of range, a wrong dtype or shape.
    """
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(f"philox_normal: shape must be (C, H, W), got {tuple(shape)}")
    c, h, w = shape
    arguments = counters("philox_normal", seed, step, layer, sample)
    normal = torch.ops.tcm_fast.philox_normal(*arguments, math.prod(shape))
    return normal.view(len(sample), h, w, c).permute(0, 3, 1, 2)
