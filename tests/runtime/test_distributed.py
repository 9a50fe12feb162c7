"""Processes that find one another."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from tcm_fast.runtime.distributed import agree_on_a_start


def meet(store, ranks, world, **options):
    """What each of these ranks, started together, takes for the start's name."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: agree_on_a_start(store, rank, world, **options), ranks))


@pytest.fixture
def store():
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=5))
    return made


@pytest.mark.parametrize("world", [2, 5])
def test_all_agree_and_each_start_has_a_name_of_its_own(store, world):
    names = [meet(store, range(world), world) for _ in range(5)]
    assert all(len(set(start)) == 1 for start in names)
    assert len({start[0] for start in names}) == 5


@pytest.mark.parametrize("closed", [False, True], ids=["rank 0 died waiting", "all had started"])
def test_what_a_dead_start_left_is_passed_over(store, closed):
    """The others are there before rank 0 is, and find its predecessor's name."""
    store.set("start", "dead")
    if closed:
        store.set("dead/1", "someone")
        store.set("dead/2", "someone else")
        store.set("dead/all", "someone,someone else")
    names = meet(store, [2, 1, 0], 3)
    assert len(set(names)) == 1
    assert names[0] != "dead"


def test_one_who_waits_alone_says_so(store):
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match=f"rank {rank} of 2 waited 0.1 s for the others"):
            agree_on_a_start(store, rank, 2, patience=0.1)
