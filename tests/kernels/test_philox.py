"""Philox4x32-7 and its Gaussians: published vectors, statistics, and independence of the batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tcm_fast.kernels import _backend
from tcm_fast.kernels.philox import (
    box_muller_reference,
    philox4x32,
    philox_bits,
    philox_normal,
    philox_words_reference,
)

with_extension = pytest.mark.skipif(
    _backend.extension() is None, reason="tcm_fast._C was not built"
)
WORD = st.integers(0, 2**32 - 1)


def words(*values):
    return tuple(torch.tensor(value) for value in values)


# Random123's kat_vectors.
ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, (0,) * 4, (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, (ONES,) * 4, (ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, PI, (0xA4093822, 0x299F31D0), "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, (0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, (ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(rounds, counter, key, expected):
    got = philox4x32(words(*counter), words(*key), rounds)
    assert " ".join(f"{word:08x}" for word in got.tolist()) == expected


def test_the_public_bits_are_the_known_ones(backend):
    zero = torch.zeros(1, dtype=torch.int64)
    bits = philox_bits(0, 0, 0, zero, 1)
    assert bits.dtype == torch.int32
    assert [w & ONES for w in bits.flatten().tolist()] == [
        *(0x5F6FB709, 0x0D893F64),
        *(0x4F121F81, 0x4F730A48),
    ]


@pytest.fixture(params=["reference", pytest.param("kernel", marks=with_extension)])
def backend(request, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", request.param)
    return request.param


@with_extension
@given(
    seed=WORD,
    step=st.integers(0, 2**63 - 1),
    layer=WORD,
    samples=st.lists(WORD, max_size=4),
    num_blocks=st.integers(0, 40),
)
def test_the_extension_equals_the_reference(seed, step, layer, samples, num_blocks):
    sample = torch.tensor(samples, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for name in ("kernel", "reference"):
            patch.setenv("TCM_FAST_BACKEND", name)
            bits = philox_bits(seed, step, layer, sample, num_blocks)
            normal = philox_normal(seed, step, layer, sample, (3, 1, num_blocks))
            results.append((bits, normal))
    for kernel, reference in zip(*results, strict=True):
        assert torch.equal(kernel, reference)
        assert kernel.stride() == reference.stride() or kernel.numel() == 0


@with_extension
def test_threads_do_not_change_the_numbers(monkeypatch):
    sample = torch.arange(40)
    alone = philox_normal(1, 2, 3, sample, (5, 16, 16))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(philox_normal(1, 2, 3, sample, (5, 16, 16)), alone)


def test_the_counter_is_block_sample_step():
    seed, step, layer, sample = 11, (7 << 32) + 5, 13, 17
    bits = philox_words_reference(*words([sample], seed, step), layer, 4)
    expected = philox4x32(words(3, sample, 5, 7), words(seed, layer))
    assert torch.equal(bits[0, 3], expected)


def test_normals_follow_the_formula():
    bits = philox_words_reference(*words([4, 9], 1, 2), 3, 6)
    u = ((bits >> 8).double() + 0.5) * 2.0**-24
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    expected = expected.reshape(2, 4, 2, 3).permute(0, 3, 1, 2)
    got = philox_normal(1, 2, 3, torch.tensor([4, 9]), (3, 4, 2))
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


def test_normals_at_the_edges_of_the_words():
    edge = torch.tensor([0, 1 << 8, (1 << 31) - 1, 1 << 31, 3 << 30, ONES - 256, ONES])
    radius, angle = torch.meshgrid(edge, edge, indexing="ij")
    got = box_muller_reference(radius, angle).double()
    u, v = (((w >> 8).double() + 0.5) * 2.0**-24 for w in (radius, angle))
    length = (-2 * u.log()).sqrt()
    assert length.min() > 0
    angle = 2 * math.pi * v
    expected = length[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    assert ((got - expected).abs() < 3e-7 * length[..., None]).all()


def test_normals_are_normal(backend):
    z = philox_normal(5, 6, 7, torch.arange(64), (3, 32, 32)).flatten().double()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / len(z))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32])
def test_neighbours_are_uncorrelated(lag):
    z = philox_normal(5, 6, 7, torch.arange(32), (1, 64, 64)).flatten(1).double()
    products = z[:, lag:] * z[:, :-lag]
    assert abs(products.mean()) < 4 / math.sqrt(products.numel())


@pytest.mark.parametrize("change", ["seed", "step", "step_high", "layer", "sample"])
def test_streams_are_uncorrelated(change):
    def draw(seed=1, step=2, step_high=0, layer=3, sample=0):
        numbers = torch.arange(sample, sample + 16)
        return philox_normal(seed, step + (step_high << 32), layer, numbers, (3, 32, 32)).double()

    a, b = draw(), draw(**{change: 16})
    assert not torch.equal(a, b)
    assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_a_sample_does_not_depend_on_its_batch(backend):
    shape = (3, 5, 7)
    whole = philox_normal(1, 2, 3, torch.arange(40), shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox_normal(1, 2, 3, order, shape), whole[order])
    parts = [philox_normal(1, 2, 3, part, shape) for part in torch.arange(40).split(7)]
    assert torch.equal(torch.cat(parts), whole)
    strided = torch.stack([torch.arange(40), torch.zeros(40, dtype=torch.int64)], 1)[:, 0]
    assert torch.equal(philox_normal(1, 2, 3, strided, shape), whole)


def test_scalars_may_be_tensors():
    sample = torch.arange(3)
    as_tensors = philox_bits(torch.tensor(8), torch.tensor(2**40), 1, sample, 5)
    assert torch.equal(as_tensors, philox_bits(8, 2**40, 1, sample, 5))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4)])
def test_empty_images(shape, backend):
    assert philox_normal(0, 0, 0, torch.arange(2), shape).shape == (2, *shape)


def test_an_empty_batch(backend):
    none = torch.empty(0, dtype=torch.int64)
    assert philox_normal(0, 0, 0, none, (3, 4, 4)).shape == (0, 3, 4, 4)
    assert philox_bits(0, 0, 0, none, 3).shape == (0, 3, 4)


def test_compiled_without_a_break():
    def noise(seed, step, sample):
        return philox_normal(seed, step, 3, sample, (3, 4, 4)) + 1

    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 2**33):
        arguments = (torch.tensor(9), torch.tensor(step), torch.arange(5))
        assert torch.equal(compiled(*arguments), noise(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seed=-1), r"philox_normal: seed must be in \[0, 2\*\*32\), got -1"),
        (dict(seed=2**32), r"philox_normal: seed must be in \[0, 2\*\*32\), got 4294967296"),
        (dict(step=2**63), r"philox_normal: step must be in \[0, 2\*\*63\)"),
        (dict(step=torch.zeros(1)), r"philox_normal: step must be an int or a 0-dim int64 tensor"),
        (dict(layer=-1), r"philox_normal: layer must be in \[0, 2\*\*32\), got -1"),
        (
            dict(sample=torch.zeros(2)),
            r"philox_normal: sample must be int64 \[N\], got torch.float32",
        ),
        (dict(shape=(3, 4)), r"philox_normal: shape must be \(C, H, W\), got \(3, 4\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = dict(seed=0, step=0, layer=0, sample=torch.arange(2), shape=(3, 4, 4))
    with pytest.raises(ValueError, match=message):
        philox_normal(**{**good, **arguments})


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="philox_bits: num_blocks must not be negative, got -1"):
        philox_bits(0, 0, 0, torch.arange(2), -1)


@with_extension
def test_the_binding_checks_sizes_too():
    from tcm_fast import _C as ext  # itself, whatever stands in for it elsewhere

    with pytest.raises(ValueError, match="philox_bits_cpu: sizes must not be negative, got -1"):
        ext.philox_bits_cpu(0, 0, -1, 4, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="philox_normal_cpu: addresses must not be null"):
        ext.philox_normal_cpu(0, 0, 2, 4, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="dropout_mask_cpu: threshold must be below 65536"):
        ext.dropout_mask_cpu(0, 0, 0, 0, 0, 0, 0, 65536, 1)
    with pytest.raises(ValueError, match="philox_bits_cpu: threads must be positive, got 0"):
        ext.philox_bits_cpu(0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["reference", "kernel"])
def test_the_device_gives_the_hosts_numbers(forced, monkeypatch):
    sample = torch.tensor([0, 3, 2**31 + 5])
    host = philox_bits(9, 2**40, 1, sample, 333), philox_normal(9, 2**40, 1, sample, (3, 17, 9))
    monkeypatch.setenv("TCM_FAST_BACKEND", forced)
    sample = sample.cuda()
    bits = philox_bits(9, 2**40, 1, sample, 333)
    normal = philox_normal(9, 2**40, 1, sample, (3, 17, 9))
    assert torch.equal(bits.cpu(), host[0])
    assert torch.equal(normal.cpu(), host[1])


@pytest.mark.gpu
def test_a_graph_is_replayed_with_other_steps():
    sample, seed = torch.arange(4, device="cuda"), torch.tensor(9, device="cuda")
    step = torch.tensor(1, device="cuda")
    philox_normal(seed, step, 3, sample, (3, 8, 8))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = philox_normal(seed, step, 3, sample, (3, 8, 8))
    for value in (1, 2**33):
        step.fill_(value)
        graph.replay()
        assert torch.equal(out.cpu(), philox_normal(9, value, 3, torch.arange(4), (3, 8, 8)))
