"""The registry: an operation at a real site, its work by formula, and its plain baseline.

A case is a site (`sites.py`) with a batch and a dtype. `work` gives the bytes that cannot be avoided
(every tensor read once, every result written once) and the floating-point operations; `plain` holds the
operations as published code writes them, one PyTorch call after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tcm_fast.benchmarks.sites import COMPUTE, KeyLike, Like, Site, loop_sites, network_sites
from tcm_fast.config import load_preset
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import noise_pair_reference
from tcm_fast.kernels.residual import of_its_terms

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
Call = Callable[..., Any]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An operation at a site, `batch` images at once, in a compute dtype."""

    site: Site
    batch: int
    dtype: torch.dtype

    @property
    def operation(self) -> str:
        return self.site.operation

    @property
    def has_backward(self) -> bool:
        return any(isinstance(v, Like) and v.requires_grad for _, v in self.site.arguments)

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "both") if self.has_backward else ("forward",)

    def __str__(self) -> str:
        return f"{self.operation} {self.site} batch {self.batch} {DTYPE_NAMES[self.dtype]}"

    def inputs(
        self,
        device: torch.device | str,
        layout: torch.memory_format = torch.contiguous_format,
        *,
        seed: int = 0,
        wide: bool = False,
    ) -> Inputs:
        """Random arguments. `wide`: the same values in float64, for the oracle."""
        generator = torch.Generator().manual_seed(seed)
        found: Inputs = {}
        for name, like in self.site.arguments:
            if isinstance(like, KeyLike):
                # On the device, for a graph: all of it is read there.
                numbers = torch.tensor([3, seed], device=device)
                sample = torch.arange(self.batch, device=device)
                found[name] = PhiloxKey(
                    seed=numbers[0], step=numbers[1], layer=like.layer, sample=sample
                )
                continue
            if not isinstance(like, Like):
                found[name] = self.dtype if like is COMPUTE else like
                continue
            dtype = like.dtype or self.dtype
            x = _random(name, like.sizes(self.batch), dtype, generator, found)
            x = x.to(device)
            if x.ndim == 4:
                x = x.contiguous(memory_format=layout)
            if wide and x.is_floating_point():
                x = x.double()
            # Of those that are left to whoever reads a sum there is none to ask for.
            is_left = bool(self.site["of_terms"]) and name in ("x_bias", "skip_bias")
            found[name] = x.requires_grad_(like.requires_grad and not is_left)
        if "own" in found:  # the images that x_t is made from
            own, t, eps = (found[name].cpu().float() for name in ("own", "t", "x_t"))
            x_t = own / 127.5 - 1 + t[:, None, None, None] * eps
            found["x_t"] = x_t.to(found["x_t"]).contiguous(memory_format=layout)
        return found


def _random(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, found: Inputs
) -> torch.Tensor:
    """Values of a tensor argument; noise levels and weights are positive, r < t, delta is t - r."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, sizes, dtype=dtype, generator=generator)
    if dtype == torch.bool:
        return torch.rand(sizes, generator=generator) < 0.5
    x = torch.randn(sizes, generator=generator)
    if name in ("t", "weighting"):
        x = x.exp()
    elif name == "r":
        x = 0.7 * found["t"].cpu().float()
    elif name == "delta":
        x = found["t"].cpu().float() - found["r"].cpu().float()
    return x.to(dtype)


# ---- work by formula ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: bytes to and from memory, floating-point operations (multiply-add is 2)."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def _elements(case: Case, name: str) -> int:
    like = case.site[name]
    return math.prod(like.sizes(case.batch)) if isinstance(like, Like) else 0


def _group_norm_silu(case: Case) -> tuple[Work, Work]:
    """2 passes over the tensor forward and 3 backward, another where the gradient of a branch that goes past
    is added, and for each such branch more; forward a sum's other term and the sum; the mean and deviation of
    each group are kept."""
    size, skip = case.dtype.itemsize, _elements(case, "skip")
    x = _elements(case, "x") + _elements(case, "second")
    rows = sum(_elements(case, name) for name in ("add", "scale", "shift")) * size
    affine = 8 * _elements(case, "weight")
    statistics = 8 * case.batch * case.site["num_groups"]
    key = 8 * (case.batch + 2) if case.site["dropout_key"] is not None else 0
    biases = 4 * sum(_elements(case, name) for name in ("x_bias", "skip_bias"))
    forward = 2 * (x + skip) * size + rows + affine + statistics + key
    past = (2 if case.site["twice"] else int(case.site["with_x"])) * x * size
    backward = 3 * x * size + past + 2 * rows + 2 * affine + statistics + key
    return Work(forward + biases * (skip > 0)), Work(backward + biases)


def _qkv_attention(case: Case) -> tuple[Work, Work]:
    """qkv in, out and one number a row out; backward qkv, out and its gradient in, that of qkv out.
    QKᵀ and PV forward; dV, dP, dQ, dK backward (a kernel that keeps no matrix computes QKᵀ anew)."""
    n, channels, height, width = case.site["qkv"].sizes(case.batch)
    c, tokens, size = channels // 3, height * width, case.dtype.itemsize
    row_sums = 4 * n * case.site["num_heads"] * tokens
    image = n * c * tokens * size
    product = 2 * n * tokens**2 * c
    forward = Work(4 * image + row_sums, 2 * product)
    return forward, Work(8 * image + row_sums, 4 * product)


def _consistency_loss(case: Case) -> tuple[Work, Work]:
    """Two raw outputs and two noisy images in, one number out; backward the same in, a gradient out."""
    image, size = _elements(case, "x_t"), case.dtype.itemsize
    clean = case.batch if case.site["is_clean"] is not None else 0
    levels = 12 * case.batch + clean
    read = 2 * image * (size + 4) + levels
    return Work(read + 8 * case.batch), Work(read - 4 * case.batch + 8 * case.batch + image * size)


def _noise_pair(case: Case) -> tuple[Work, Work]:
    """Images in; images in [-1, 1], noisy ones and the networks' inputs out, each once or twice."""
    y, pairs = case.site["y"], 2 if case.site["r"] is not None else 1
    image = _elements(case, "y")
    read = image * (y.dtype or case.dtype).itemsize + 4 * pairs * case.batch
    key = 8 * (case.batch + 2)
    ones = image // y.shape[1] if case.site["append_ones"] else 0
    written = image * (4 + 4 * pairs) + (image + ones) * pairs * case.dtype.itemsize
    return Work(read + key + written), Work(0)


def _denoise_to_uint8(case: Case) -> tuple[Work, Work]:
    image = _elements(case, "x")
    return Work(image * (case.dtype.itemsize + 4 + 1) + 4 * case.batch), Work(0)


def _posterior_mean(case: Case) -> tuple[Work, Work]:
    """Noisy images and both sets of bytes in, the means out; a product with the bank for the distances and
    one for the mean."""
    image, bank = _elements(case, "x_t"), _elements(case, "bank")
    return Work(image * (4 + 1 + 4) + bank + 4 * case.batch, 4 * case.batch * bank), Work(0)


def _residual(case: Case) -> tuple[Work, Work]:
    """Two images in and one out; backward one in and one out, the gradient of both."""
    image = _elements(case, "x") * case.dtype.itemsize
    bias = 4 * (_elements(case, "bias") + _elements(case, "skip_bias"))
    return Work(3 * image + bias), Work(2 * image + bias)


def _residual_conv1x1(case: Case) -> tuple[Work, Work]:
    """The other term, the images that are multiplied and the weight in, the sum out; backward its gradient,
    the images and the weight in, their gradients out, and that of the other term if it is another number."""
    size, image, weight = case.dtype.itemsize, _elements(case, "x"), _elements(case, "weight")
    multiplied = _elements(case, "skip") + _elements(case, "second")
    products = 2 * multiplied * case.site["weight"].shape[0]
    biases = 4 * (_elements(case, "x_bias") + _elements(case, "skip_bias"))
    is_scaled = case.site["scale"] != 1 and not case.site["of_terms"]
    backward = ((1 + is_scaled) * image + 2 * (multiplied + weight)) * size
    backward += 0 if case.site["of_terms"] else biases
    forward = (2 * image + multiplied + weight) * size + biases
    return Work(forward, products), Work(backward, 2 * products)


FORMULAS: dict[str, Callable[[Case], tuple[Work, Work]]] = {
    "group_norm_silu": _group_norm_silu,
    "qkv_attention": _qkv_attention,
    "consistency_loss": _consistency_loss,
    "noise_pair": _noise_pair,
    "denoise_to_uint8": _denoise_to_uint8,
    "posterior_mean": _posterior_mean,
    "residual": _residual,
    "residual_conv1x1": _residual_conv1x1,
}


def _each_once(case: Case) -> tuple[Work, Work]:
    """For an operation without a formula: arguments and results once; backward both gradients and the
    arguments. What aliases an argument is not written."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        inputs = case.inputs("cpu")
        results = tensors_of(plain(case)(**inputs))
    given = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    old = {x.untyped_storage()._cdata for x in given}
    new = {id(x): x.nbytes for x in results if x.untyped_storage()._cdata not in old}
    wanted = sum(x.nbytes for x in given if x.requires_grad)
    read = sum(x.nbytes for x in given)
    forward = read + sum(new.values())
    return Work(forward), Work(read + sum(x.nbytes for x in results) + wanted)


def work(case: Case, direction: str) -> Work:
    """The work of a forward pass, or of `both`, forward and backward."""
    forward, backward = FORMULAS.get(case.operation, _each_once)(case)
    return forward if direction == "forward" else forward + backward


def tensors_of(results: Any) -> list[torch.Tensor]:
    """The tensors of what an operation returns."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for x in results if isinstance(x, torch.Tensor)]


# ---- the operations as published code writes them -----------------------------------------------


def plain_group_norm_silu(
    x, num_groups, weight, bias, eps=1e-5, *, silu=True, add=None, scale=None, shift=None,
    dropout_p=0.0, dropout_key=None, with_x=False, twice=False, **merged,
):  # fmt: skip
    past, x = plain_merge(x, **merged)
    y = x if add is None else x + add[:, :, None, None]
    y = F.group_norm(y, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        y = torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None] + 1)
    y = F.silu(y) if silu else y
    y = F.dropout(y, dropout_p) if dropout_p > 0 else y
    return beside(y, past, with_x, twice)


def beside(y, past, with_x, twice):
    """What a normalisation returns: its result, with the parts of what it read where these are asked for."""
    first, *second = past
    return (y, *[first] * (2 if twice else 1), *second) if with_x or twice else y


def plain_merge(
    x, skip=None, sum_scale=1.0, x_bias=None, skip_bias=None, summed=False, second=None
):
    """The parts of what a normalisation reads, x or the sum that ends a residual branch and `second`, and
    both side by side."""
    if summed:
        x = of_its_terms(x, sum_scale, x_bias, skip_bias)
    if skip is not None:
        biases = [b.to(x.dtype)[:, None, None] for b in (x_bias, skip_bias) if b is not None]
        x = sum(biases, x) + skip
        x = x * sum_scale if sum_scale != 1 else x
    return ([x], x) if second is None else ([x, second], torch.cat([x, second], 1))


def plain_residual_conv1x1(
    x, skip, weight, scale=1.0, x_bias=None, skip_bias=None, *, second=None, up=False, **_
):
    """`of_terms` is not published: the same work and gradients `scale` times as large."""
    _, joined = plain_merge(skip, second=second)
    y = F.conv2d(joined, weight, skip_bias if skip_bias is None else skip_bias.to(x.dtype))
    y = F.interpolate(y, scale_factor=2.0) if up else y
    return plain_merge(x, y, scale, x_bias)[1]


def plain_qkv_attention(qkv, num_heads, *, normalize=False, scale=None):
    n, channels, height, width = qkv.shape
    d = channels // 3 // num_heads
    x = qkv.reshape(n * num_heads, d, 3, height * width)
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=_wide(x)) / math.sqrt(d)
        x = x / (norm + 1e-4).to(x.dtype)
    q, k, v = x.unbind(2)
    logits = torch.einsum("ncq,nck->nqk", q.to(_wide(q)), (k / math.sqrt(d)).to(_wide(k)))
    out = torch.einsum("nqk,nck->ncq", logits.softmax(2).to(v.dtype), v)
    return out.reshape(n, channels // 3, height, width)


def plain_noise_pair(y, t, r=None, key=None, *, dtype=torch.float32, noise=None, **options):
    noise = torch.randn(y.shape, device=y.device) if noise is None else noise
    return noise_pair_reference(y, t, r, noise, dtype=dtype, **options)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


PLAIN: dict[str, Call] = {
    "group_norm_silu": plain_group_norm_silu,
    "qkv_attention": plain_qkv_attention,
    "noise_pair": plain_noise_pair,
    "residual_conv1x1": plain_residual_conv1x1,
}


def plain(case: Case) -> Call:
    """The operation in plain PyTorch: the baseline and, on float64, the oracle."""
    function = PLAIN.get(case.operation) or case.site.reference
    if function is None:
        raise ValueError(f"{case.operation}: has no {case.operation}_reference to compare with")
    return function


# ---- which cases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkShape:
    """A network by `build_network`'s arguments, hashable."""

    name: str
    img_resolution: int
    img_channels: int
    architecture: tuple[tuple[str, Any], ...] = ()
    label_dim: int = 0

    @classmethod
    def of_preset(cls, preset: str, resolution: int, channels: int, label_dim: int = 0) -> Any:
        network = load_preset(preset).network
        options = {
            key: tuple(value) if isinstance(value, list | tuple) else value
            for key, value in network.architecture().items()
        }
        return cls(network.name, resolution, channels, tuple(options.items()), label_dim)

    @property
    def label(self) -> str:
        width = dict(self.architecture).get("model_channels", "")
        return f"{self.name}-{self.img_resolution} width {width}"

    def sites(self) -> list[Site]:
        found = network_sites(
            self.name, self.img_resolution, self.img_channels, self.label_dim,
            **dict(self.architecture),
        )  # fmt: skip
        around = loop_sites(self.img_resolution, self.img_channels)
        return [replace(site, network=self.label) for site in (*found, *around)]


CIFAR10 = NetworkShape.of_preset("cifar10", 32, 3)
NARROW = NetworkShape(
    "ddpmpp", 32, 3,
    (("model_channels", 32), ("channel_mult", (1, 2, 2)), ("num_blocks", 1), ("attn_resolutions", (16,))),
)  # fmt: skip
DIGITS = NetworkShape.of_preset("digits", 8, 1)


def available_networks() -> list[NetworkShape]:
    """The recipes' networks."""
    edm2 = NetworkShape.of_preset("imagenet64-s", 64, 3, 1000)
    return [CIFAR10, edm2, NetworkShape("adm", 64, 3, (), 1000)]


def cases(
    networks: Iterable[NetworkShape], batches: Iterable[int], dtypes: Iterable[torch.dtype]
) -> list[Case]:
    """Every site of the networks that has something to be compared with, in each batch and dtype."""
    batches, dtypes = list(batches), list(dtypes)
    return [
        Case(site, batch, dtype)
        for network in networks
        for site in network.sites()
        if site.reference is not None or site.operation in PLAIN
        for batch in batches
        for dtype in dtypes
    ]
