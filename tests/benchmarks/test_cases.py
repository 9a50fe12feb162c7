"""Sites, work by formula, and the check that goes before any timing."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tcm_fast.benchmarks.accounting import Counting
from tcm_fast.benchmarks.cases import (
    CIFAR10,
    DIGITS,
    FORMULAS,
    NARROW,
    Case,
    available_networks,
    cases,
    plain,
    work,
)
from tcm_fast.benchmarks.check import Provider, check, check_ends, make_call, wrong
from tcm_fast.benchmarks.optimizers import check_step
from tcm_fast.benchmarks.peers import TORCH_KINDS, optimizer_providers, providers
from tcm_fast.benchmarks.sites import Like, Site, public_operations
from tcm_fast.kernels._triton import assuming_kernels

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16]
SMALL = cases([DIGITS], [3], DTYPES)
# fp32 heads of 256 channels are no operator of ours: a library serves them.
OF_CIFAR10 = [
    case
    for case in cases([CIFAR10], [2], DTYPES)
    if case.operation != "qkv_attention" or case.dtype != torch.float32
]


# ---- sites --------------------------------------------------------------------------------------


def test_the_sites_of_ddpmpp_are_the_published_ones():
    """73 normalisations and 6 attentions; DESIGN, section 10."""
    counts = {}
    for site in CIFAR10.sites():
        counts[site.operation] = counts.get(site.operation, 0) + site.count
    assert counts["group_norm_silu"] == 73
    assert counts["qkv_attention"] == 6
    tokens = [s["qkv"].shape[2] ** 2 for s in CIFAR10.sites() if s.operation == "qkv_attention"]
    assert sorted(tokens) == [64, 256]
    around = {"noise_pair", "consistency_loss", "denoise_to_uint8"}
    assert around <= counts.keys() <= set(public_operations().values())


@pytest.mark.parametrize("network", available_networks(), ids=lambda network: network.label)
def test_whatever_a_network_calls_is_a_case(network):
    """A new operation needs a reference, of its file's name, to be compared with."""
    sites = network.sites()
    found = {case.site for case in cases([network], [1], [torch.float32])}
    assert found == set(sites)
    names = [str(case) for case in cases([network], [1], [torch.float32])]
    assert len(names) == len(set(names)), "two sites have one name"


@pytest.mark.parametrize("network", available_networks(), ids=lambda network: network.label)
def test_operations_take_what_is_drawn_for_a_case(network, monkeypatch):
    """With the GPU's kernels in their places, on tensors without memory."""
    for case in cases([network], [2], [torch.bfloat16]):
        if case.operation == "posterior_mean":  # whose noisy images are made from values
            continue
        monkeypatch.setattr(
            "tcm_fast.benchmarks.cases._random",
            lambda name, sizes, dtype, *_: torch.empty(sizes, dtype=dtype, device="meta"),
        )
        with assuming_kernels(), Counting():
            case.site.function(**case.inputs("meta", torch.channels_last))


def test_listening_leaves_the_modules_as_they_were():
    from tcm_fast.networks import layers

    before = layers.group_norm_silu
    NARROW.sites()
    assert layers.group_norm_silu is before


def test_inputs_are_drawn_for_the_site():
    (case,) = [
        c for c in cases([NARROW], [5], [torch.bfloat16]) if c.operation == "consistency_loss"
    ]
    inputs = case.inputs("cpu", torch.channels_last)
    assert inputs["output"].dtype == torch.bfloat16
    assert inputs["output"].requires_grad
    assert inputs["x_t"].dtype == torch.float32
    assert inputs["x_t"].shape == (5, 3, 32, 32)
    assert inputs["x_t"].is_contiguous(memory_format=torch.channels_last)
    assert (inputs["r"] < inputs["t"]).all()
    torch.testing.assert_close(inputs["delta"], inputs["t"] - inputs["r"])
    assert not torch.equal(inputs["x_t"], case.inputs("cpu", seed=1)["x_t"])


# ---- work by formula against work counted -------------------------------------------------------


def operators(case, direction, monkeypatch):
    """What the operation's own kernels read and write, counted without running them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # kernels would run, were the tensors not fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = make_call(case.site.function, case.inputs("cpu", torch.channels_last), direction)
        with Counting() as counting:
            call()
    return {
        n: t for n, t in counting.by_name.items() if n.startswith(f"tcm_fast::{case.operation}")
    }


@pytest.mark.parametrize("case", OF_CIFAR10, ids=str)
def test_bytes_by_formula_are_those_of_the_operators(case, monkeypatch):
    """Within 2 %: the last sum over the batch of a normalisation's gradients is left out, and operators
    are given numbers on the device that the formulas round."""
    is_library = case.operation == "residual_conv1x1"  # its backward pass; see the test of it below
    for direction in case.directions[:1] if is_library else case.directions:
        tallies = operators(case, direction, monkeypatch).values()
        counted = sum(tally.bytes for tally in tallies)
        assert counted > 0
        assert sum(tally.flops for tally in tallies) == work(case, direction).flops
        assert work(case, direction).bytes == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("case", OF_CIFAR10[:1] + cases([NARROW], [2], DTYPES), ids=str)
def test_the_rule_for_operations_without_a_formula_agrees(case, monkeypatch):
    """Each argument and result once."""
    if case.site["y"] is not None and case.site["y"].dtype != torch.uint8:
        pytest.skip("the operator writes out images that plain PyTorch passes on")
    if case.site["skip"] is not None and not case.site["with_x"]:
        pytest.skip("the operator keeps a sum that plain PyTorch does not return")
    exact = work(case, "forward").bytes
    monkeypatch.delitem(FORMULAS, case.operation)
    assert work(case, "forward").bytes == pytest.approx(exact, rel=0.05)


def sum_of_a_convolution(up, of_terms):
    """A site of `residual_conv1x1`."""
    channels = Like((32,), torch.float32, True)
    images = {
        name: Like((None, c, size, size), None, True)
        for name, c, size in (
            ("x", 32, 16),
            ("skip", 48, 8 if up else 16),
            ("second", 16, 8 if up else 16),
        )
    }
    arguments = {
        **images, "weight": Like((32, 64, 1, 1), None, True), "scale": 0.7, "x_bias": channels,
        "skip_bias": channels, "up": up, "of_terms": of_terms,
    }  # fmt: skip
    module = "tcm_fast.kernels.residual_conv1x1"
    return Site("residual_conv1x1", tuple(arguments.items()), "by hand", 1, module)


@pytest.mark.parametrize("of_terms", [False, True])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_that_a_convolution_carries_out(dtype, up, of_terms, monkeypatch):
    """Its work forward is its operator's and plain PyTorch's products, and whoever can run is right."""
    case = Case(sum_of_a_convolution(up, of_terms), 3, dtype)
    assert str(case).startswith("residual_conv1x1 Nx32x16x16 ")
    (tally,) = operators(case, "forward", monkeypatch).values()
    assert tally.flops == work(case, "forward").flops
    assert tally.bytes == pytest.approx(work(case, "forward").bytes, rel=0.01)
    for direction in case.directions:
        call = make_call(plain(case), case.inputs("cpu"), direction)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == work(case, direction).flops
    monkeypatch.delenv("TRITON_INTERPRET")
    for provider in providers(case, "cpu"):
        assert provider.gap or not check(case, provider, "cpu"), provider.name


ATTENTION = [
    case for case in cases([CIFAR10, NARROW], [2], DTYPES) if case.operation == "qkv_attention"
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_operations_by_formula_are_the_flop_counters(case):
    call = make_call(plain(case), case.inputs("cpu"), "both")
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == work(case, "both").flops
    with FlopCounterMode(display=False) as counter:
        make_call(plain(case), case.inputs("cpu"), "forward")()
    assert counter.get_total_flops() == work(case, "forward").flops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_pytorchs_traffic_is_what_its_operations_move(dtype):
    """add, group_norm and silu read and write the tensor once each: 6 passes, where the fused operation
    takes 2."""
    site = next(s for s in CIFAR10.sites() if s["add"] is not None)
    site = dataclasses.replace(
        site, arguments=tuple((k, 0.0 if k == "dropout_p" else v) for k, v in site.arguments)
    )
    case = Case(site, 4, dtype)
    with FakeTensorMode():
        inputs = {k: v for k, v in case.inputs("cpu").items() if k != "dropout_key"}
        with Counting() as counting, torch.no_grad():
            plain(case)(**inputs)
    elements = inputs["x"].numel()
    assert counting.total.bytes == pytest.approx(6 * elements * dtype.itemsize, rel=0.01)
    assert work(case, "forward").bytes == pytest.approx(2 * elements * dtype.itemsize, rel=0.01)


# ---- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_whoever_can_run_is_right(case):
    for provider in providers(case, "cpu"):
        if not provider.gap:
            assert not check(case, provider, "cpu"), provider.name
            if provider.is_ours:
                assert not check_ends(case, provider, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["group_norm_silu", "qkv_attention"])
def test_torch_compile_is_right(operation):
    case = next(c for c in SMALL if c.operation == operation and c.dtype == torch.float32)
    (provider,) = [p for p in providers(case, "cpu", compiled=True) if p.name == "torch.compile"]
    if provider.gap:
        pytest.skip(provider.gap)
    assert not check(case, provider, "cpu")


def spoiled(function, spoil):
    def wrapped(**inputs):
        results = function(**inputs)
        if isinstance(results, torch.Tensor):
            return spoil(results)
        return (spoil(results[0]), *results[1:])

    return wrapped


SPOILS = {
    "scaled": lambda x: x * 1.5,
    "a hole": lambda x: torch.cat([x[:1] * float("nan"), x[1:]]),
    "a wrong gradient": lambda x: x.detach() + 0.5 * (x - x.detach()),
}


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("operation", ["group_norm_silu", "qkv_attention", "consistency_loss"])
def test_a_wrong_answer_is_caught(operation, spoil, is_ours):
    case = next(c for c in SMALL if c.operation == operation)
    function = case.site.function if is_ours else plain(case)
    if not is_ours and case.site["dropout_key"] is not None:
        pytest.skip("the plain one takes no key")
    provider = Provider("x", spoiled(function, SPOILS[spoil]), is_ours=is_ours)
    if not is_ours:
        provider = dataclasses.replace(provider, make=lambda **i: provider_make(function, spoil, i))
    assert "is off by" in check(case, provider, "cpu")


def provider_make(function, spoil, inputs):
    inputs.pop("dropout_key", None)
    return spoiled(function, SPOILS[spoil])(**inputs)


def test_a_provider_that_fails_says_why():
    def broken(**_):
        raise RuntimeError("no such kernel")

    assert check(SMALL[0], Provider("x", broken), "cpu") == "RuntimeError: no such kernel"


def test_an_error_at_the_end_of_the_batch_is_caught():
    """In images that the small check does not have."""
    case = next(c for c in cases([DIGITS], [6], [torch.float32]) if c.operation == "qkv_attention")

    def forgets_the_last(qkv, *args, **kwargs):
        out = case.site.function(qkv, *args, **kwargs)
        return torch.cat([out[:5], 0 * out[5:]])

    provider = Provider("x", forgets_the_last, is_ours=True)
    assert not check(case, provider, "cpu")
    assert "is off by" in check_ends(case, provider, "cpu")


def test_bounds():
    exact = [torch.linspace(-1, 1, 100, dtype=torch.float64)]
    same = [x.to(torch.bfloat16) for x in exact]
    assert not wrong(same, same, exact, torch.bfloat16, is_ours=True)
    twice = [(x + 2.5 * (x - e)).to(torch.float32) for x, e in zip(same, exact, strict=True)]
    assert wrong(twice, same, exact, torch.bfloat16, is_ours=True)
    assert not wrong(twice, same, exact, torch.bfloat16, is_ours=False)
    assert "instead of" in wrong([], same, exact, torch.bfloat16, is_ours=True)
    bytes_ = [torch.tensor([3, 200], dtype=torch.uint8)]
    assert not wrong([bytes_[0] + 1], bytes_, [bytes_[0]], torch.float32, is_ours=True)
    assert wrong([bytes_[0] + 2], bytes_, [bytes_[0]], torch.float32, is_ours=True)


@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_optimizers_are_right_and_wrong_ones_are_not(kind, monkeypatch):
    from tcm_fast.benchmarks import optimizers

    for provider, gap in optimizer_providers(kind, "cpu").items():
        if not gap:
            assert not check_step(kind, provider, "cpu"), provider
    make = optimizers.make_step

    def twice(*arguments):
        step = make(*arguments)
        return lambda: (step(), step())

    monkeypatch.setattr(optimizers, "make_step", twice)
    assert "is off by" in check_step(kind, "foreach", "cpu")
