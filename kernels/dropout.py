"""Counter-based dropout: which elements are dropped is a function of (seed, step, layer, sample,
element), so that masks are recomputed, never stored, and do not depend on dtype, layout, device or how
the batch is cut."""

import math
from dataclasses import dataclass

import torch

from tcm_fast.kernels._backend import extension_for
from tcm_fast.kernels.philox import counters, launch, philox_words_reference


@dataclass(frozen=True, eq=False, kw_only=True)
class PhiloxKey:
    """What decides a batch's masks and noise.

    seed: below 2**32; step: below 2**63; each an int or a 0-dim int64 tensor on the samples' device
    (a tensor, where the step is compiled or captured in a graph).
    layer: which of the network's dropouts, below 2**32.
    sample: int64 [N], positions in the global batch, below 2**32.
    """

    seed: int | torch.Tensor
    step: int | torch.Tensor
    layer: int = 0
    sample: torch.Tensor

    def at_layer(self, layer: int) -> "PhiloxKey":
        return PhiloxKey(seed=self.seed, step=self.step, layer=layer, sample=self.sample)

    def select(self, index: torch.Tensor | slice) -> "PhiloxKey":
        """The key of some rows of the batch."""
        return PhiloxKey(
            seed=self.seed, step=self.step, layer=self.layer, sample=self.sample[index]
        )


# -- reference ------------------------------------------------------------------------------------


def dropout_mask_reference(
    sample: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    layer: int,
    threshold: int,
    elements: int,
) -> torch.Tensor:
    """-> bool [N, elements], true where kept: element e has lane e%8 of block e//8, lane 2j being the
    low half of word j and 2j+1 the high one, and is kept where lane >= threshold."""
    words = philox_words_reference(sample, seed, step, layer, -(-elements // 8))
    lanes = torch.stack([words & 0xFFFF, words >> 16], -1)
    return lanes.flatten(1)[:, :elements] >= threshold


def _as_image(elements: torch.Tensor, shape) -> torch.Tensor:
    n, c, h, w = shape
    return elements.view(n, h, w, c).permute(0, 3, 1, 2)


def _apply(x: torch.Tensor, kept: torch.Tensor, threshold: int) -> torch.Tensor:
    """x over the realised keep probability where kept, zero elsewhere (also where x is infinite)."""
    out = torch.empty_like(x)
    return torch.where(kept, x * (65536 / (65536 - threshold)), x.new_zeros(()), out=out)


# -- launchers ------------------------------------------------------------------------------------


def _mask(sample, seed, step, layer, threshold, elements):
    ext = extension_for("dropout", sample.device)
    if ext is None:
        kept = dropout_mask_reference(sample, seed, step, layer, threshold, elements)
        return kept.contiguous()
    out = torch.empty((len(sample), elements), dtype=torch.bool, device=sample.device)
    return launch("dropout_mask", ext, out, sample, (elements,), seed, step, layer, threshold)


def _dropout(x, sample, seed, step, layer, threshold):
    _, c, h, w = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    ext = extension_for("dropout", x.device)
    fused = x.device.type == "cpu" and x.dtype == torch.float32
    if ext is None or not fused or not (channels_last or x.is_contiguous()):
        kept = _mask(sample, seed, step, layer, threshold, c * h * w)
        return _apply(x, _as_image(kept, x.shape), threshold)
    sizes = (c, h * w, channels_last)
    out = torch.empty_like(x)
    return launch("dropout", ext, out, sample, sizes, seed, step, layer, threshold, inputs=(x,))


# -- registration ---------------------------------------------------------------------------------

torch.library.define(
    "tcm_fast::dropout_mask",
    "(Tensor sample, Tensor seed, Tensor step, int layer, int threshold, SymInt elements) -> Tensor",
)
torch.library.define(
    "tcm_fast::dropout",
    "(Tensor x, Tensor sample, Tensor seed, Tensor step, int layer, int threshold) -> Tensor",
)
torch.library.impl("tcm_fast::dropout_mask", "CompositeExplicitAutograd", _mask)
torch.library.impl("tcm_fast::dropout", ("cpu", "cuda"), _dropout)


@torch.library.register_fake("tcm_fast::dropout_mask")
def _(sample, seed, step, layer, threshold, elements):
    return sample.new_empty((sample.shape[0], elements), dtype=torch.bool)


@torch.library.register_fake("tcm_fast::dropout")
def _(x, sample, seed, step, layer, threshold):
    return torch.empty_like(x)


def _save_key(ctx, inputs, output):
    _, *key, ctx.layer, ctx.threshold = inputs
    ctx.save_for_backward(*key)


def _dropout_bwd(ctx, grad_y):
    # Dropout is linear and its own adjoint.
    grad_x = torch.ops.tcm_fast.dropout(grad_y, *ctx.saved_tensors, ctx.layer, ctx.threshold)
    return grad_x, None, None, None, None, None


torch.library.register_autograd("tcm_fast::dropout", _dropout_bwd, setup_context=_save_key)


# -- public functions -----------------------------------------------------------------------------


def _threshold(name: str, p: float) -> int:
    """p in 65536ths, as the masks have it."""
    if not 0 <= p < 1 or round(p * 65536) == 65536:
        raise ValueError(f"{name}: p must be in [0, 1) and not round to 1, got {p}")
    return round(p * 65536)


def _check_samples(name: str, key: PhiloxKey, n: int, device: torch.device) -> None:
    if not isinstance(key, PhiloxKey):
        raise TypeError(f"{name}: key must be a PhiloxKey, got {type(key).__name__}")
    if len(key.sample) != n:
        raise ValueError(f"{name}: key.sample must have N={n} entries, got {len(key.sample)}")
    if key.sample.device != device:
        raise ValueError(f"{name}: key.sample must be on {device}, got {key.sample.device}")


def check_dropout(name: str, p: float, key: PhiloxKey | None) -> None:
    """ValueError for a dropout_p out of range, or without its dropout_key."""
    if not 0 <= p < 1:
        raise ValueError(f"{name}: dropout_p must be in [0,1), got {p}")
    if p > 0 and key is None:
        raise ValueError(f"{name}: dropout_key is required where dropout_p > 0, got None")


def key_arguments(name: str, p: float, key: PhiloxKey | None, n: int, device: torch.device):
    """(sample, seed, step, layer, threshold) as an operator that drops takes them, checked; no key where
    nothing is dropped."""
    threshold = _threshold(name, p)
    if threshold == 0:
        return None, None, None, 0, 0
    assert key is not None
    _check_samples(name, key, n, device)
    return *counters(name, key.seed, key.step, key.layer, key.sample), threshold


def key_of(sample, seed, step, layer: int, threshold: int) -> PhiloxKey | None:
    """The key out of such arguments."""
    if threshold == 0:
        return None
    return PhiloxKey(seed=seed, step=step, layer=layer, sample=sample)


def dropout_mask(
    key: PhiloxKey,
    p: float,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """What `dropout` keeps: bool [N,C,H,W] in channels_last memory, or [N,C].

    Args:
        key: decides the mask; on any device.
        p: probability of being dropped, in [0, 1); realised as round(p·65536)/65536.
        shape: (N,C,H,W) or (N,C).
        device: of the mask; None is the key's.

    Raises:
        ValueError: p out of range, or a shape that does not fit the key.
    """
    if len(shape) not in (2, 4):
        raise ValueError(f"dropout_mask: shape must be (N,C,H,W) or (N,C), got {tuple(shape)}")
    threshold = _threshold("dropout_mask", p)
    _check_samples("dropout_mask", key, shape[0], key.sample.device)
    sample = key.sample if device is None else key.sample.to(device)
    arguments = counters("dropout_mask", key.seed, key.step, key.layer, sample)
    elements = math.prod(shape[1:])
    kept = torch.ops.tcm_fast.dropout_mask(*arguments, threshold, elements)
    return kept if len(shape) == 2 else _as_image(kept, shape)


def dropout(x: torch.Tensor, p: float, key: PhiloxKey) -> torch.Tensor:
    """Zeroes elements with probability p and divides the others by the realised keep probability
    1 - round(p·65536)/65536. The backward pass recomputes the mask from the key.

    Args:
        x: fp16, bf16, fp32 or fp64 [N,C,H,W] in any layout, or [N,C].
        p: in [0, 1); 0 returns x itself.
        key: seed, step, layer and the rows' sample numbers, on x's device.

    Returns:
        dtype, shape and layout of x.

    Raises:
        ValueError: p out of range, a shape or device that does not fit the key.
        TypeError: x not floating, or no key.
    """
    threshold = _threshold("dropout", p)
    if p == 0:
        return x
    if x.ndim not in (2, 4):
        raise ValueError(f"dropout: x must be [N,C,H,W] or [N,C], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"dropout: x must be floating, got {x.dtype}")
    _check_samples("dropout", key, x.shape[0], x.device)
    sample, seed, step, layer = counters("dropout", key.seed, key.step, key.layer, key.sample)
    image = x[:, :, None, None] if x.ndim == 2 else x
    y = torch.ops.tcm_fast.dropout(image, sample, seed, step, layer, threshold)
    return y[:, :, 0, 0] if x.ndim == 2 else y
