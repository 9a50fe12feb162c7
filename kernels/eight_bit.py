"""Moments in 8 bits, a quarter of their memory: the form in which `fused_step` reads and writes them.

Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization") keep integers by blocks, looked up in
a table and rounded to the nearest. Here a code is a float with three bits of mantissa, and a block of
128 elements has an exponent of its own: values are on the same grid whatever their block's scale, so that a
moment that does not move is not rounded again, and rounding can be random (unbiased), which a second
moment that moves by a thousandth a step needs.
"""

import torch

BLOCK = 128
TOP = {"exp_avg": 127, "exp_avg_sq": 255}
"""Magnitudes but zero; the first moment has a sign too."""
NEAREST = 0x8000
"""In the place of 16 random bits."""


def line_of(numel: int, row: int) -> int:
    """Elements within which blocks are counted from the first."""
    return row or max(numel, 1)


def packed_size(numel: int, row: int = 0) -> int:
    """Bytes of a moment: codes [numel], then the exponents of its blocks.

    Args:
        row: elements of a row where rows are normalised (blocks do not cross them), else 0.
    """
    line = line_of(numel, row)
    return numel + numel // line * -(-line // BLOCK)


def can_be_packed(numel: int, row: int = 0) -> bool:
    """Whether `fused_step` takes a moment of this size in 8 bits: it moves four elements at a time."""
    return line_of(numel, row) % 4 == 0


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order in which they lie."""
    return x.as_strided((x.numel(),), (1,))


def _blocks(flat: torch.Tensor, row: int) -> torch.Tensor:
    """[blocks, BLOCK], zeros where a row's last block is short."""
    line = line_of(flat.numel(), row)
    lines = flat.view(-1, line)
    padded = torch.nn.functional.pad(lines, (0, -line % BLOCK))
    return padded.view(-1, BLOCK)


def _first_code(exponents: torch.Tensor, top: int) -> torch.Tensor:
    return (exponents << 3 | 7) - top


def pack_8_bits_reference(
    x: torch.Tensor, top: int, row: int = 0, random_16_bits: torch.Tensor | int = NEAREST
) -> torch.Tensor:
    """fp32 to one of its two neighbours among the codes, uint8 [packed_size]. What lies below the least
    magnitude becomes that or zero; a second moment (top 255) becomes that unless it is zero, because a
    step divides by its root.

    Args:
        x: dense, any layout.
        random_16_bits: int64 like `x` in shape and layout, or one for all.
    """
    flat = _in_memory(x)
    words: torch.Tensor | int = random_16_bits
    if isinstance(words, torch.Tensor):
        words = _blocks(_in_memory(words), row)
    values = _blocks(flat, row)
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    size = bits & 0x7FFFFFFF
    exponents = ((size.amax(1, keepdim=True) + 0xFFFFF) >> 23).clamp(min=32)
    zero = _first_code(exponents, top)
    least = (zero + 1) << 20
    codes = ((size + (words << 4 | 8)) >> 20) - zero
    up = size != 0
    if top == TOP["exp_avg"]:
        up = values.abs() > least.int().view(torch.float32) * ((words + 0.5) * 2.0**-16)
    codes = torch.where(size < least, up.long(), codes) | (bits >> 31) * ((top + 1) & 0xFF)
    line = line_of(flat.numel(), row)
    kept = codes.view(-1, -(-line // BLOCK) * BLOCK)[:, :line].flatten()
    return torch.cat([kept, exponents.flatten()]).to(torch.uint8)


def unpack_8_bits_reference(
    packed: torch.Tensor, like: torch.Tensor, top: int, row: int = 0
) -> torch.Tensor:
    """fp32 in the shape and layout of `like`."""
    numel = like.numel()
    codes, exponents = packed[:numel].long(), packed[numel:].long()
    line = line_of(numel, row)
    of_line = exponents.view(-1, -(-line // BLOCK)).repeat_interleave(BLOCK, 1)[:, :line].flatten()
    magnitude = codes & top
    bits = torch.where(magnitude > 0, (_first_code(of_line, top) + magnitude) << 20, 0)
    bits = bits | (codes & ~top) << 24
    bits = torch.where(bits > 0x7FFFFFFF, bits - 0x100000000, bits).to(torch.int32)
    return bits.view(torch.float32).as_strided(like.shape, like.stride())
