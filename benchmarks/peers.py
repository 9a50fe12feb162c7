"""Who carries out an operation: plain PyTorch, torch.compile, this package, and other people's kernels
where they are installed. Nothing here is needed to use the package; what is missing says why."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcm_fast.benchmarks.cases import PLAIN, Call, Case, beside, plain, plain_merge
from tcm_fast.benchmarks.check import Provider
from tcm_fast.kernels.qkv_attention import NORM_EPS, qkv_attention_reference

BASELINE = "pytorch"  # what speed-ups are relative to: published code, NCHW
OURS = "tcm_fast"


def missing(module: str) -> str:
    """Why a module cannot be used; empty where it can."""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return "" if found else f"{module} is not installed"


def without_key(function: Call) -> Call:
    """For functions that know nothing of our dropout keys."""
    return lambda **inputs: function(**{k: v for k, v in inputs.items() if k != "dropout_key"})


def providers(
    case: Case, device: torch.device | str, *, compiled: bool | None = None
) -> list[Provider]:
    """Everybody who could carry out a case on this device, those who cannot with the reason.

    compiled: time torch.compile as well; None does so on a GPU (on a CPU it compiles for minutes)."""
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    last = torch.channels_last
    own_chance = case.site["dropout_key"] is not None or case.operation == "noise_pair"
    function = without_key(plain(case)) if case.operation in PLAIN else plain(case)
    found = [
        Provider(BASELINE, function, own_chance=own_chance),
        Provider(f"{BASELINE} channels_last", function, last, own_chance=own_chance),
        Provider(
            "torch.compile", _compiled(function), last, _compile_gap(is_cuda, compiled),
            own_chance=own_chance,
        ),
        Provider(
            OURS, case.site.function, last if is_cuda else torch.contiguous_format, is_ours=True
        ),
    ]  # fmt: skip
    return found + PEERS.get(case.operation, lambda *_: [])(case, is_cuda)


def _compiled(function: Call) -> Call:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compile_gap(is_cuda: bool, wanted: bool | None) -> str:
    if wanted is None and not is_cuda:
        return "takes minutes on a CPU: --compiled"
    if wanted is False:
        return "left out"
    if not is_cuda and shutil.which("c++") is None and shutil.which("g++") is None:
        return "needs a C++ compiler"
    return ""


# ---- group normalisation ------------------------------------------------------------------------


def _with_surroundings(norm: Callable[..., torch.Tensor], activates: bool) -> Call:
    """A library's group normalisation in the place of the operation: it adds, modulates and drops as
    plain PyTorch does. `activates`: the library fuses the SiLU."""

    def function(
        x, num_groups, weight, bias, eps=1e-5, *, silu=True, add=None, scale=None, shift=None,
        dropout_p=0.0, dropout_key=None, with_x=False, twice=False, **merged,
    ):  # fmt: skip
        fused = activates and silu and scale is None
        past, x = plain_merge(x, **merged)
        y = x if add is None else x + add[:, :, None, None]
        y = norm(y, num_groups, weight, bias, eps, fused)
        if scale is not None:
            y = torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None] + 1)
        y = F.silu(y) if silu and not fused else y
        y = F.dropout(y, dropout_p) if dropout_p > 0 else y
        return beside(y, past, with_x, twice)

    return function


def _liger(x, num_groups, weight, bias, eps, _fused):
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    w, b = weight.to(x.dtype), bias.to(x.dtype)
    y = LigerGroupNormFunction.apply(x.flatten(2), w, b, x.shape[1], num_groups, eps)
    return y.view(x.shape)


def _apex(x, num_groups, weight, bias, eps, fused):
    from apex.contrib.group_norm import GroupNorm

    layer = GroupNorm(num_groups, x.shape[1], eps, device=x.device, act="silu" if fused else "")
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def _group_norm_peers(case: Case, is_cuda: bool) -> list[Provider]:
    own_chance = case.site["dropout_key"] is not None
    no_gpu = "" if is_cuda else "needs a GPU"
    return [
        Provider(
            "liger", _with_surroundings(_liger, False), gap=no_gpu or missing("liger_kernel"),
            own_chance=own_chance,
        ),
        Provider(
            "apex", _with_surroundings(_apex, True), torch.channels_last,
            no_gpu or missing("group_norm_cuda"), own_chance=own_chance,
        ),
    ]  # fmt: skip


# ---- attention ----------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Call:
    """PyTorch's fused attention, with the copies that its backends ask for."""

    def function(qkv, num_heads, *, normalize=False, scale=None):
        with sdpa_kernel(backend):
            return qkv_attention_reference(qkv, num_heads, normalize=normalize, scale=scale)

    return function


def _flash_attn(qkv, num_heads, *, normalize=False, scale=None):
    from flash_attn import flash_attn_qkvpacked_func

    n, channels, height, width = qkv.shape
    d = channels // 3 // num_heads
    x = qkv.reshape(n, num_heads, d, 3, height * width).permute(0, 4, 3, 1, 2).contiguous()
    if normalize:
        wide = x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(d)
        x = (wide / (NORM_EPS + rms)).to(qkv.dtype)
    out = flash_attn_qkvpacked_func(x, softmax_scale=scale)
    return out.reshape(n, height, width, channels // 3).permute(0, 3, 1, 2)


def _attention_peers(case: Case, is_cuda: bool) -> list[Provider]:
    is_wide = case.dtype == torch.float32
    gaps = {
        SDPBackend.MATH: "",
        SDPBackend.FLASH_ATTENTION: "16 bits only" if is_wide and is_cuda else "",
        SDPBackend.EFFICIENT_ATTENTION: "" if is_cuda else "needs a GPU",
        SDPBackend.CUDNN_ATTENTION: (
            "needs a GPU" if not is_cuda else "16 bits only" if is_wide else ""
        ),
    }
    layout = torch.channels_last if is_cuda else torch.contiguous_format
    found = [
        Provider(f"sdpa {backend.name.split('_')[0].lower()}", _sdpa(backend), layout, gap)
        for backend, gap in gaps.items()
    ]
    gap = "" if is_cuda else "needs a GPU"
    gap = gap or ("16 bits only" if is_wide else "") or missing("flash_attn")
    return [*found, Provider("flash-attn", _flash_attn, layout, gap)]


PEERS: dict[str, Callable[[Case, bool], list[Provider]]] = {
    "group_norm_silu": _group_norm_peers,
    "qkv_attention": _attention_peers,
}


# ---- optimizers ---------------------------------------------------------------------------------

TORCH_KINDS = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}


def optimizer_providers(kind: str, device: torch.device | str) -> dict[str, str]:
    """Who takes an optimizer step, and why not."""
    from tcm_fast.kernels._backend import extension_gap

    device = torch.device(device)
    found = {OURS: extension_gap(device), "foreach": "", "loop": ""}
    if kind == "adam":
        apex = "" if device.type == "cuda" else "needs a GPU"
        found |= {"fused": "", "apex": apex or missing("amp_C")}
    return found


def make_optimizer(kind: str, provider: str, weights: list[torch.nn.Parameter]) -> Any:
    """Torch's or apex's optimizer (ours takes the rest of the step in as well, see optimizers.py)."""
    if provider == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(weights, lr=1e-4, adam_w_mode=False)
    options = {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
    return partial(TORCH_KINDS[kind], weights, lr=1e-4)(**options[provider])
