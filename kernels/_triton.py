"""What the Triton kernels share: the import (Triton is optional), when a kernel runs, the count of
launches, what runs where a kernel does not compile, and the list of compiled variants that the static
report goes through."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

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
    VERSION = (0, 0)
else:
    AVAILABLE = True
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

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
    """Whether operation `name` runs its Triton kernel on tensors of this device type: not in forward-mode
    differentiation, where a kernel would lose the tangents.

    Raises:
        ValueError: TCM_FAST_BACKEND=kernel, and no Triton kernel can run.
    """
    choice = backend()
    if choice == "reference" or (name in _uncompiled and choice != "kernel"):
        return False
    if forward_ad._current_level >= 0:
        if choice == "kernel":
            raise ValueError(
                f"{name}: TCM_FAST_BACKEND=kernel has no forward-mode derivatives, set another backend"
            )
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
    """Whether an operation may call its launcher as a plain function: nothing compiles, transforms,
    differentiates forward or watches operators. The dispatcher takes longer over an operator in Python
    than the launch itself."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
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

    def compile_all() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            for kernel, grid, args, constants in noted.values():
                kernel.warmup(*args, grid=grid, **constants)

    try:
        copy_context().run(compile_all)  # Triton 3.6 leaves its mode on in the context of an error
    except Exception:
        for launched in noted.values():
            if error := _compile_error(*launched):
                _leave_to_reference(launched[0], error)


class CompilationError(RuntimeError):
    """A kernel does not compile for this GPU."""


_uncompiled: set[str] = set()
"""Operations with a kernel that does not compile for this GPU: their references run."""


def _operation(function: Any) -> str:
    """The operation to which a function of its file belongs."""
    return function.__module__.rpartition(".")[2]


def _compile_error(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]
) -> Exception | None:
    """Why a kernel does not compile, None where it does; a compiled one is not compiled again."""
    try:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        if hasattr(compiled, "result"):  # it was begun by another thread
            compiled.result()
    except Exception as error:
        return error
    return None


def _leave_to_reference(kernel: Any, error: Exception) -> None:
    """From here on the reference of the kernel's operation runs, which a warning says once.

    Raises:
        CompilationError: TCM_FAST_BACKEND=kernel.
    """
    operation = _operation(kernel.fn)
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = "compute capability {}.{}".format(*torch.cuda.get_device_capability())
    why = " ".join(str(error).split())[-300:] or type(error).__name__  # after the source, if any
    what = (
        f"{operation}: {kernel.__name__} does not compile with Triton {triton.__version__} for {gpu} "
        f"({why})"
    )
    if backend() == "kernel":
        raise CompilationError(f"{what}, and TCM_FAST_BACKEND=kernel allows no other") from error
    if operation not in _uncompiled:
        _uncompiled.add(operation)
        warnings.warn(f"{what}; its PyTorch reference runs instead", RuntimeWarning, stacklevel=2)


def or_reference(kernels: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernels`, or `reference` with the same arguments where a kernel of the operation does not compile.

    It stands inside the operator, so that a graph that was built or compiled with kernels goes on."""
    operation = _operation(kernels)

    @functools.wraps(kernels)
    def run(*args: Any) -> Any:
        if operation not in _uncompiled or backend() == "kernel":
            try:
                return kernels(*args)
            except CompilationError:
                if backend() == "kernel":
                    raise
        return reference(*args)

    return run


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    grad_outputs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """The gradient to each of a reference's inputs, None to those that are None; grad_outputs may be None.
    Works inside an operator too, where the dispatcher leaves autograd out."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [None if v is None else v.detach().requires_grad_() for v in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        given = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad([y for y, _ in used], given, [g for _, g in used]))
    return [None if leaf is None else next(grads) for leaf in leaves]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor and counts the launch; nothing for an empty grid.

    Raises:
        CompilationError: the kernel does not compile; `or_reference` catches it.
    """
    if 0 in grid:
        return
    constants.setdefault("enable_fp_fusion", True)  # releases of Triton differ in what is usual
    if _noted is not None:
        _note(kernel, grid, args, constants)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, grid, args, constants)
    else:
        _run(kernel, grid, args, constants)


def _run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    try:
        kernel[grid](*args, **constants)
    except Exception as error:
        # Any other error would not come again from compiling alone; a lack of shared memory shows when
        # the compiled kernel is loaded.
        is_too_large = type(error).__name__ == "OutOfResources"
        why = error if is_too_large else _compile_error(kernel, grid, args, constants)
        if why is None:
            raise
        _leave_to_reference(kernel, why)
        raise CompilationError(kernel.__name__) from why
    LAUNCHES[kernel.__name__] += 1


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
