"""Precisions, and torch's settings for the whole program: changed for a while and put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "bf16x3": torch.float32,
}
"""In which dtype convolutions and matrix products compute, by the names of the configuration. bf16x3 is fp32
whose convolutions are sums of three bf16 products (`conv_bf16x3`; not yet timed on a GPU)."""


def splits_convolutions(precision: str) -> bool:
    """Whether fp32 convolutions are sums of products of bf16 parts."""
    return precision == "bf16x3"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, fp32 convolutions and matrix products on a GPU may (or may not) round operands to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
    """Inside, a library that cuts a matrix product of 16 bits into pieces does not add these in 16 bits, as
    torch lets it: a weight's gradient sums over all pixels of a batch."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


@contextmanager
def training_settings(precision: str, *, deterministic: bool) -> Iterator[None]:
    """Inside, what training in `precision` needs: TF32 or not, sums of products in fp32; cuDNN tries its
    algorithms out for each shape, or, where the run has to be deterministic, only algorithms that are."""
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, not deterministic
    try:
        chosen = _deterministic() if deterministic else nullcontext()
        with tf32(precision == "tf32"), _sums_in_fp32(), chosen:
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _deterministic() -> Iterator[None]:
    settings: Any = torch.utils.deterministic
    fill, workspace = settings.fill_uninitialized_memory, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    mode = torch.get_deterministic_debug_mode()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings.fill_uninitialized_memory = False  # our kernels write all that they are given to write
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
