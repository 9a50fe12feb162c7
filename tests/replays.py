"""Stand-ins for CUDA graphs on a CPU."""

from contextlib import nullcontext


class Recorded:
    """The same places in memory, and the work done again at each replay."""

    def __init__(self, place, work, tensors):
        self.place, self.work, self.tensors = place, work, tensors

    def replay(self):
        self.place.replays += 1
        self.result = self.work(*self.tensors)


class OnHost:
    """Where a `GraphCache` on a CPU runs, and what it did there.

    failures: raised by the captures, one after another."""

    def __init__(self, failures=()):
        self.failures, self.captures, self.replays = list(failures), 0, 0

    stream = memory = staticmethod(nullcontext)

    def capture(self, work, tensors):
        if self.failures:
            raise self.failures.pop(0)
        self.captures += 1
        return Recorded(self, work, tensors)
