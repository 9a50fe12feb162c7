"""Captured work: when it is captured, and that a replay sees new inputs."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from replays import OnHost

from tcm_fast.runtime.cuda_graphs import WARM_UPS, CaptureError, CudaPlace, GraphCache, _CudaReplay


@pytest.fixture
def place():
    return OnHost()


@pytest.fixture
def cache(place):
    return GraphCache(place)


def test_the_third_call_captures_and_later_ones_replay(cache, place):
    calls = []

    def work(x, y):
        calls.append(x.data_ptr())
        return x * y

    for i in range(6):
        x = torch.full((3,), float(i))
        assert cache("a", work, x, torch.full((3,), 2.0)).tolist() == [2.0 * i] * 3
        assert place.captures == (i >= WARM_UPS)
    assert len(set(calls[WARM_UPS:])) == 1


def test_keys_shapes_and_dtypes_have_captures_of_their_own(cache, place):
    for _ in range(4):
        for x in (torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.float64)):
            assert cache("a", lambda x: x + 1, x).tolist() == [2.0] * len(x)
            assert cache("b", lambda x: x + 2, x).tolist() == [3.0] * len(x)
    assert place.captures == 6


def test_layouts_are_kept(cache):
    image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        result = cache("a", lambda x: x * 2, image)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, image * 2)


def test_each_capture_is_announced(place):
    """An optimizer lays out the table that a graph reads before its capture, every time."""
    log = []

    @contextmanager
    def capturing():
        log.append("before")
        yield
        log.append("after")

    cache = GraphCache(place, capturing)
    for size in (1, 2, 3):
        for _ in range(4):
            cache("a", lambda x: log.append(len(x)) or x, torch.ones(size))
    # Two calls, the capture, and the replays, which here do the work.
    expected = [[n, n, "before", "after", n, n] for n in (1, 2, 3)]
    assert log == [entry for each in expected for entry in each]


def test_a_capture_that_fails_leaves_the_cache_usable():
    cache = GraphCache(OnHost(failures=[torch.OutOfMemoryError("no"), CaptureError("no")]))
    x = torch.ones(2)
    for _ in range(WARM_UPS):
        cache("a", torch.neg, x)
    with pytest.raises(torch.OutOfMemoryError):
        cache("a", torch.neg, x)
    with pytest.raises(CaptureError):
        cache("a", torch.neg, x)
    assert torch.equal(cache("a", torch.neg, x), -x)


@pytest.mark.parametrize(
    ("inside", "kind"),
    [(torch.OutOfMemoryError("full"), torch.OutOfMemoryError), (ValueError("what"), CaptureError)],
)
def test_what_fails_inside_a_capture_is_said(inside, kind, monkeypatch):
    """The end of a capture that failed raises something of its own, which says nothing."""

    @contextmanager
    def graph(*_, **options):
        assert options["capture_error_mode"] == "thread_local"  # images are read meanwhile
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def work():
        raise inside

    with pytest.raises(kind, match=str(inside)):
        _CudaReplay(work, [], SimpleNamespace(id=(0, 1)), None)


def test_a_capture_that_failed_keeps_nothing_alive(monkeypatch):
    """Its memory is wanted for the same work without a graph."""

    @contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    alive = []

    def work():
        activations = torch.ones(3)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("full")

    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            _CudaReplay(work, [], SimpleNamespace(id=(0, 1)), None)
        assert alive[0]() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_graph_on_the_gpu():
    cache = GraphCache(CudaPlace(torch.device("cuda")))
    weight = torch.ones(4, device="cuda")
    for i in range(6):
        x = torch.full((4,), float(i), device="cuda")
        assert cache("a", lambda x: x * weight, x).tolist() == [float(i)] * 4
