"""A kernel that does not compile: its operation's reference runs instead, with one warning."""

import importlib
import warnings
from functools import partial

import pytest
import torch

import tcm_fast.kernels as kernels
from tcm_fast.kernels import _triton
from tcm_fast.kernels._triton import (
    LAUNCHES,
    CompilationError,
    compiling_together,
    or_reference,
    runs_triton,
)
from tcm_fast.kernels.denoise_to_uint8 import denoise_to_uint8
from tcm_fast.kernels.dropout import PhiloxKey

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Broken:
    """Takes a kernel's place: its compiler gives up, or its launch does where it `compiles`."""

    def __init__(self, kernel, compiles=False):
        self.fn, self.__name__, self.compiles = kernel.fn, kernel.__name__, compiles

    def __getitem__(self, grid):
        return self._fail

    def warmup(self, *args, grid, **constants):
        if not self.compiles:
            self._fail()

    def _fail(self, *args, **constants):
        raise RuntimeError("PassManager::run failed")


@pytest.fixture
def broken(monkeypatch):
    """broken(operation, part) breaks the operation's kernels whose names contain `part`; the others
    run, interpreted where there is no GPU."""
    monkeypatch.setattr(_triton, "_uncompiled", set())
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def break_kernels(operation, part="", **options):
        module = __import__(f"tcm_fast.kernels.{operation}", fromlist=["_"])
        names = [name for name in vars(module) if name.endswith("_kernel") and part in name]
        assert names
        for name in names:
            monkeypatch.setattr(module, name, Broken(getattr(module, name), **options))

    return break_kernels


def key():
    sample = torch.tensor([5, 2], device=DEVICE)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return PhiloxKey(seed=zero + 3, step=zero + 7, layer=4, sample=sample)


X, HIGH, ROW, CHANNEL, SAMPLE = (2, 16, 4, 4), (2, 16, 8, 8), (2, 16), (16,), (2,)


def group_norm(x, weight, bias, add=None, scale=None, shift=None, **options):
    return kernels.group_norm_silu(x, 4, weight, bias, add=add, scale=scale, shift=shift, **options)


def loss(output, x_t, t, target, x_r, r, delta, **options):
    t, r, delta = (v.detach().abs() + 0.1 for v in (t, r, delta))
    fixed = (v.detach() for v in (target, x_r))
    return kernels.consistency_loss(
        output, x_t.detach(), t, *fixed, r, delta=delta, c=0.03, **options
    )


CLEAN = torch.tensor([True, False], device=DEVICE)
NORM = importlib.import_module("tcm_fast.kernels.group_norm_silu")
CASES = {
    "residual": (partial(kernels.residual, scale=0.5), (X, X)),
    "residual bias": (lambda x, y, b: kernels.residual(x, y, 0.5, b), (X, X, CHANNEL)),
    "residual unscaled": (lambda x, y, b: kernels.residual(x, y, 1.0, b), (X, X, CHANNEL)),
    "residual_conv1x1": (
        lambda x, y, z, w, b: kernels.residual_conv1x1(x, y, w, 0.5, b, second=z),
        (X, X, X, (16, 32, 1, 1), CHANNEL),
    ),
    "residual_conv1x1 up": (
        lambda x, y, w: kernels.residual_conv1x1(x, y, w, up=True), (HIGH, X, (16, 16, 1, 1))
    ),
    "mp_sum": (partial(kernels.mp_sum, t=0.3), (X, X)),
    "mp_sum clipped": (partial(kernels.mp_sum, t=0.3, clip=0.7, with_silu=True), (X, X)),
    "mp_cat_mp_silu": (partial(kernels.mp_cat_mp_silu, t=0.4), (X, X)),
    "resample up": (partial(kernels.resample, mode="up", with_silu=True), (X,)),
    "resample down": (partial(kernels.resample, mode="down", with_silu=True), (HIGH,)),
    "resample plain": (partial(kernels.resample, mode="down"), (HIGH,)),
    "pixel_norm_mp_silu": (kernels.pixel_norm_mp_silu, (X,)),
    "modulate_mp_silu": (kernels.modulate_mp_silu, (X, ROW, ())),
    "modulate_mp_silu in parts": (
        lambda x, scale, gain: kernels.modulate_mp_silu(
            x, scale[:, None].expand(-1, 2, -1), gain.expand(len(x), 2, 4)
        ),
        (X, ROW, ()),
    ),
    "modulate_mp_silu dropout": (
        lambda *v: kernels.modulate_mp_silu(*v, dropout_p=0.3, dropout_key=key()), (X, ROW, ())
    ),
    "group_norm_silu": (group_norm, (X, CHANNEL, CHANNEL)),
    "group_norm_silu modulated": (group_norm, (X, CHANNEL, CHANNEL, ROW, ROW, ROW)),
    "group_norm_silu dropout": (
        lambda *v: group_norm(*v, dropout_p=0.3, dropout_key=key(), with_x=True),
        (X, CHANNEL, CHANNEL, ROW, ROW, ROW),
    ),
    "qkv_attention": (partial(kernels.qkv_attention, num_heads=1), ((2, 48, 4, 4),)),
    "qkv_attention normalised": (
        partial(kernels.qkv_attention, num_heads=2, normalize=True), ((2, 96, 4, 4),)
    ),
    "consistency_loss": (
        partial(loss, weighting="inv_dt", is_clean=CLEAN),
        (X, X, SAMPLE, X, X, SAMPLE, SAMPLE),
    ),
    "consistency_loss weighted": (
        partial(loss, weighting=torch.tensor([0.5, 2.0], device=DEVICE)),
        (X, X, SAMPLE, X, X, SAMPLE, SAMPLE),
    ),
}  # fmt: skip


def draw(shapes, layout, dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [
        v.to(DEVICE, torch.float32).to(dtype).contiguous(memory_format=layout)
        if v.ndim == 4
        else v.to(DEVICE, torch.float32)
        for v in tensors
    ]


def outputs_and_gradients(function, tensors):
    """The outputs, and the gradients of all that have one, of a sum with fixed factors."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [v for v in outputs if v is not None]
    total = sum((v.double() * torch.linspace(1, 2, v.numel(), device=v.device, dtype=torch.float64)
                 .reshape(v.shape)).sum() for v in outputs)  # fmt: skip
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [v.detach() for v in outputs], [g for g in grads if g is not None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("part", ["", "_bwd"])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_takes_over(case, part, layout, broken, monkeypatch, check_against_oracle):
    function, shapes = CASES[case]
    operation = case.split()[0]
    if part and operation == "residual_conv1x1":
        pytest.skip("its backward pass has no kernel of ours")
    monkeypatch.setattr(NORM, "on_cpu", lambda *_: False)  # as on a GPU
    tensors = draw(shapes, layout)
    narrow = [v.to(torch.float32) for v in tensors]
    with monkeypatch.context() as reference:
        reference.setenv("TCM_FAST_BACKEND", "reference")
        expected = outputs_and_gradients(function, narrow)
        wide = [v.double() for v in narrow]
        exact = outputs_and_gradients(function, wide)
    broken(operation, part)
    before = LAUNCHES.total()
    message = f"^{operation}: _{operation}_.*kernel does not compile with Triton .*PassManager"
    with pytest.warns(RuntimeWarning, match=message) as noticed:
        got = outputs_and_gradients(function, narrow)
    assert len(noticed) == 1
    assert (LAUNCHES.total() > before) == (part == "_bwd")
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert a.isfinite().all()
            check_against_oracle(a, b, c.double(), case)
    assert all(v.ndim < 4 or v.is_contiguous(memory_format=layout) for v in got[0])
    launches = LAUNCHES.total()
    assert not runs_triton(operation, DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = outputs_and_gradients(function, narrow)
    assert LAUNCHES.total() == launches
    for first, second in zip(again, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backward_pass_in_16_bits(dtype, broken, check_against_oracle, monkeypatch):
    x, weight, bias = draw((X, CHANNEL, CHANNEL), torch.channels_last, dtype)
    with monkeypatch.context() as reference:
        reference.setenv("TCM_FAST_BACKEND", "reference")
        expected = outputs_and_gradients(group_norm, [x, weight, bias])
        exact = outputs_and_gradients(group_norm, [x.double(), weight.double(), bias.double()])
    broken("group_norm_silu")
    with pytest.warns(RuntimeWarning, match="group_norm_silu"):
        got = outputs_and_gradients(group_norm, [x, weight, bias])
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        for a, b, c in zip(ours, theirs, truth, strict=True):
            check_against_oracle(a, b, c, str(dtype))


@pytest.mark.parametrize("r", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_noise_and_bytes_by_their_references(r, dtype, broken, monkeypatch):
    y = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8, device=DEVICE).to(dtype)
    y = y.contiguous(memory_format=torch.channels_last)
    t = torch.full((2,), 0.7, device=DEVICE)
    levels = t, None if r is None else t * r

    def both():
        pair = kernels.noise_pair(y, *levels, key(), append_ones=True)
        image = denoise_to_uint8(pair.x_t, pair.x_t, t)
        return [v for v in pair if v is not None], image

    with monkeypatch.context() as reference:
        reference.setenv("TCM_FAST_BACKEND", "reference")
        expected, image = both()
    broken("noise_pair")
    broken("denoise_to_uint8")
    with pytest.warns(RuntimeWarning) as noticed:
        got, byte = both()
    assert sorted(str(w.message).split(":")[0] for w in noticed) == [
        "denoise_to_uint8",
        "noise_pair",
    ]
    assert torch.equal(byte, image)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert ours.data_ptr() != y.data_ptr()


def test_with_kernels_demanded_it_is_an_error(broken, monkeypatch):
    broken("residual")
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    x = torch.ones(X, device=DEVICE)
    named = (
        r"residual: _residual_fwd_kernel .* Triton \d+\.\d+.* for (no GPU|compute capability \d)"
    )
    for _ in range(2):
        with pytest.raises(CompilationError, match=named):
            kernels.residual(x, x)
    with pytest.raises(CompilationError, match=named), compiling_together():
        kernels.residual(x, x)


def test_the_warm_up_finds_it_before_anything_runs(broken):
    broken("group_norm_silu", "_bwd")
    x = torch.ones(X, device=DEVICE, requires_grad=True)
    weight, bias = (torch.ones(16, device=DEVICE) for _ in range(2))

    def step():
        kernels.group_norm_silu(x, 4, weight, bias).sum().backward()
        kernels.residual(x, x).sum().backward()

    def warm_up():
        with compiling_together():
            step()

    with pytest.warns(RuntimeWarning, match="_group_norm_silu_bwd_kernel") as noticed:
        warm_up()
    assert len(noticed) == 1
    assert not runs_triton("group_norm_silu", DEVICE)
    assert runs_triton("residual", DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_another_error_of_a_launch_is_passed_on(broken):
    broken("residual", compiles=True)
    x = torch.ones(X, device=DEVICE)
    with pytest.raises(RuntimeError, match="PassManager"):
        kernels.residual(x, x)
    assert runs_triton("residual", DEVICE)


def test_a_kernel_that_needs_more_memory_than_there_is(broken, monkeypatch):
    class OutOfResources(Exception):
        pass

    def fail(self, *args, **constants):
        raise OutOfResources("out of resource: shared memory")

    broken("residual", compiles=True)
    monkeypatch.setattr(Broken, "_fail", fail)
    x = torch.ones(X, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="out of resource: shared memory"):
        assert torch.equal(kernels.residual(x, x), 2 * x)


def test_a_compiled_network_goes_on(broken):
    x = torch.rand(X, device=DEVICE, requires_grad=True)
    weight, bias = (torch.ones(16, device=DEVICE) for _ in range(2))

    def network(x):
        return kernels.residual(x, kernels.group_norm_silu(x, 4, weight, bias), 0.5).square().sum()

    (expected,) = torch.autograd.grad(network(x), x)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    (same,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(same, expected)
    broken("group_norm_silu")
    broken("residual", "_bwd")
    with pytest.warns(RuntimeWarning) as noticed:
        (grad,) = torch.autograd.grad(compiled(x), x)
    assert len([w for w in noticed if "does not compile" in str(w.message)]) == 2
    torch.testing.assert_close(grad, expected)


def test_an_operation_returns_to_its_kernels_only_where_they_are_demanded(broken, monkeypatch):
    monkeypatch.setattr(_triton, "_uncompiled", {"test_fallback"})
    run = or_reference(lambda x: x + 1, lambda x: x - 1)
    assert run(1) == 0
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    assert run(1) == 2


@pytest.mark.parametrize(
    "name", ["residual", "residual_conv1x1", "mp_sum", "pixel_norm_mp_silu", "group_norm_silu"]
)
def test_forward_mode_runs_the_reference(name, monkeypatch):
    """A kernel would hand on values without their tangents."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    operation = getattr(importlib.import_module(f"tcm_fast.kernels.{name}"), name)
    x, v = torch.randn(2, 2, 8, 3, 3, device=DEVICE)
    rest = {
        "residual": (v,), "mp_sum": (v,), "pixel_norm_mp_silu": (),
        "residual_conv1x1": (v, torch.ones(8, 8, 1, 1, device=DEVICE), 0.5),
        "group_norm_silu": (2, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)),
    }[name]  # fmt: skip

    def first(x):
        out = operation(x, *rest)
        return out[0] if isinstance(out, tuple) else out

    def along():
        with torch.autograd.forward_ad.dual_level():
            dual = first(torch.autograd.forward_ad.make_dual(x, v))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        return torch.func.jvp(first, (x,), (v,))[1], tangent

    found = along()
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    for ours, expected in zip(found, along(), strict=True):
        assert torch.equal(ours, expected)
        assert expected.any()
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    with pytest.raises(ValueError, match="no forward-mode derivatives"):
        along()
