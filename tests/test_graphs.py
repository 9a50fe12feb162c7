"""Captured work: when it is captured, and that a replay sees new inputs."""

import pytest
import torch

from tcm_fast.graphs import WARM_UPS, GraphCache


class Recorded:
    """Stands for a CUDA graph on a CPU: the same places in memory, the work done again."""

    captures = 0

    def __init__(self, work, tensors):
        type(self).captures += 1
        self.work, self.tensors = work, tensors
        self.result = work(*tensors)

    def replay(self):
        self.result.copy_(self.work(*self.tensors))


@pytest.fixture
def cache():
    Recorded.captures = 0
    return GraphCache(Recorded)


def test_the_third_call_captures_and_later_ones_replay(cache):
    calls = []

    def work(x, y):
        calls.append(x.data_ptr())
        return x * y

    for i in range(6):
        x = torch.full((3,), float(i))
        assert cache("a", work, x, torch.full((3,), 2.0)).tolist() == [2.0 * i] * 3
        assert Recorded.captures == (i >= WARM_UPS)
    assert len(set(calls[WARM_UPS:])) == 1


def test_keys_shapes_and_dtypes_have_captures_of_their_own(cache):
    for _ in range(4):
        for x in (torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.float64)):
            assert cache("a", lambda x: x + 1, x).tolist() == [2.0] * len(x)
            assert cache("b", lambda x: x + 2, x).tolist() == [3.0] * len(x)
    assert Recorded.captures == 6


def test_layouts_are_kept(cache):
    image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        result = cache("a", lambda x: x * 2, image)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, image * 2)


@pytest.mark.gpu
def test_a_graph_on_the_gpu():
    cache = GraphCache()
    weight = torch.ones(4, device="cuda")
    for i in range(6):
        x = torch.full((4,), float(i), device="cuda")
        assert cache("a", lambda x: x * weight, x).tolist() == [float(i)] * 4
