"""What the Triton kernels share: the import (Triton is optional), when a kernel runs, the count of
launches, and the list of compiled variants that the static report and the warm-up go through."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tcm_fast.kernels._backend import backend

try:
    import triton
    import triton.language as tl
except ImportError:  # the references serve; the decorated kernels are never called

    class _Absent:
        """Stands in for triton and triton.language where kernels are defined."""

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: args[0] if args else lambda f: f

    triton = tl = _Absent()  # type: ignore[assignment]
    AVAILABLE = False
else:
    AVAILABLE = True

LAUNCHES: Counter[str] = Counter()
"""Kernel launches by kernel name since the process began; the tests see by it that a kernel ran."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (on the CPU, slowly, for their numbers)."""
    return AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"


_assumed = False


@contextmanager
def assuming_kernels(assumed: bool = True) -> Iterator[None]:
    """Inside, operations on the meta device are a GPU's: what they allocate can be counted anywhere."""
    global _assumed
    before, _assumed = _assumed, assumed
    try:
        yield
    finally:
        _assumed = before


@torch.compiler.assume_constant_result
def runs_triton(name: str, device_type: str) -> bool:
    """Whether operation `name` runs its Triton kernel on tensors of this device type.

    Raises:
        ValueError: TCM_FAST_BACKEND=kernel, and no Triton kernel can run.
    """
    choice = backend()
    if choice == "reference":
        return False
    if device_type == "meta":
        return _assumed
    if AVAILABLE and (device_type == "cuda" or (device_type == "cpu" and interpreting())):
        return True
    if choice == "kernel":
        why = "Triton is not installed" if not AVAILABLE else "TRITON_INTERPRET is not 1"
        why = why if device_type in ("cpu", "cuda") else "Triton serves CUDA"
        raise ValueError(
            f"{name}: TCM_FAST_BACKEND=kernel needs a kernel on {device_type}, got none ({why})"
        )
    return False


def calls_directly(x: torch.Tensor) -> bool:
    """Whether an operation may call its launcher as a plain function: nothing compiles, transforms or
    watches operators. The dispatcher takes longer over an operator in Python than the launch itself."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


class _Argument:
    """What decides which compiled form a tensor gets: a stand-in that keeps no memory alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self._address = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0

    @property
    def key(self) -> tuple[torch.dtype, int]:
        return self.dtype, self._address


_noted: dict[Any, tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]] | None = None


def _note(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: Any) -> None:
    """Remember a launch, unless one like it is known."""
    assert _noted is not None
    kept = [_Argument(a) if isinstance(a, torch.Tensor) else a for a in args]
    # Triton tells whole numbers apart by whether they are 1, a multiple of 16, or need 64 bits.
    by = [
        a.key if isinstance(a, _Argument)
        else (a == 1, a % 16 == 0, abs(a) >= 2**31) if type(a) is int
        else type(a)
        for a in kept
    ]  # fmt: skip
    _noted[(kernel, *by, *sorted(constants.items()))] = kernel, grid, kept, constants


@contextmanager
def compiling_together() -> Iterator[Collection[Any]]:
    """Inside, launches are noted and not carried out (what they would write is undefined); at the end all
    noted kernels that are not compiled yet are compiled in parallel, instead of each at its first use.

    Yields what is noted, one tuple (kernel, ...) for each compiled form. Not to be entered by two threads
    at once."""
    global _noted
    assert _noted is None
    noted = _noted = {}
    try:
        yield noted.values()
    finally:
        _noted = None
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for kernel, grid, args, constants in noted.values():
            kernel.warmup(*args, grid=grid, **constants)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor and counts the launch; nothing for an empty grid."""
    if 0 in grid:
        return
    constants.setdefault("enable_fp_fusion", True)  # releases of Triton differ in what is usual
    if _noted is not None:
        _note(kernel, grid, args, constants)
        return
    LAUNCHES[kernel.__name__] += 1
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel at a real site.

    signature: argument name -> Triton type ("*bf16", "*fp32", "i32", ...), constexprs left out.
    constants: constexpr name -> value. aligned: arguments that are multiples of 16 (pointers are).
    programs: grid size at the site's batch, for the share of the GPU that it fills.
    """

    site: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    fp_fusion: bool = True
    aligned: frozenset[str] = field(default_factory=frozenset)
    programs: int = 0
