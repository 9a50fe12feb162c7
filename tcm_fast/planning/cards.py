"""What is known of graphics cards from their data sheets, for plans without the card at hand; and what the
device that is there can do.

Dense rates with fp32 sums; a data sheet's rate is never reached, so plans take the stated share of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from tcm_fast.config import parse_bytes, suggest
from tcm_fast.planning.throughput import measure_ceilings

GIB = 2**30
# Shares of a data sheet's rates that a training step is taken to reach where nothing was measured.
# bf16x3 on a GPU is not timed: matrix products of others gained a third of what their data sheet promised.
EFFICIENCY = {"fp32": 0.6, "tf32": 0.4, "fp16": 0.4, "bf16": 0.4, "bf16x3": 0.2}
BANDWIDTH_SHARE = 0.75
LAUNCH = 4e-6  # seconds that an operation takes at least
PCIE = 20e9  # bytes per second and direction between host and device


@dataclass(frozen=True)
class Card:
    """A device: bytes of memory, floating-point operations per second by precision, bytes per second. Where
    `measured`, the rates are those of this device and count in full."""

    name: str
    memory: int
    fp32: float
    tf32: float
    fp16: float
    bandwidth: float
    measured: bool = False
    on_gpu: bool = True
    has_rates: bool = True
    """False: only the memory is known, and the rates are those of some card, for comparisons."""
    bf16x3: float = 0.0
    """Of fp32 convolutions by three bf16 products, where measured; else a third of bf16's rate counts."""

    def flops(self, precision: str) -> float:
        """Operations per second that a step is taken to reach."""
        if precision == "bf16x3" and not self.bf16x3:
            return self.fp16 / 3 * EFFICIENCY[precision]
        rate = getattr(self, "fp16" if precision == "bf16" else precision)
        return rate * EFFICIENCY["fp32" if precision == "bf16x3" else precision]

    @property
    def gains_by_bf16x3(self) -> bool:
        """Whether bf16x3 is expected to be faster than fp32: not on RTX cards, by their data sheets."""
        return self.on_gpu and self.has_rates and self.flops("bf16x3") > self.flops("fp32")

    @property
    def usable(self) -> int:
        """What is left for tensors: the context, kernels and what else draws on the card take three
        eighths of a GiB and 4.7 % (7.25 of 8 GiB, 22.5 of 24)."""
        if not self.on_gpu:
            return self.memory
        return max(int(self.memory * (1 - 3 / 64) - 0.375 * GIB), 0)

    @property
    def basis(self) -> str:
        """Where the speeds come from, for a table's caption."""
        share = ", ".join(f"{100 * EFFICIENCY[p]:.0f} % of its {p} rate" for p in ("fp32", "fp16"))
        source = "rates measured here" if self.measured else "its data sheet"
        return f"computed from {source}: {share}, {100 * BANDWIDTH_SHARE:.0f} % of its bandwidth"


def _card(
    name: str, memory: float, fp32: float, tf32: float, fp16: float, bandwidth: float
) -> Card:
    """GiB, TFLOP/s, GB/s."""
    rates = (fp32 * 1e12, tf32 * 1e12, fp16 * 1e12, bandwidth * 1e9)
    return Card(name, int(memory * GIB), *rates)


CARDS = {
    card.name: card
    for card in (
        _card("rtx3060", 12, 12.7, 12.7, 25.5, 360),
        _card("rtx3070", 8, 20.3, 20.3, 40.6, 448),
        _card("rtx3080", 10, 29.8, 29.8, 59.5, 760),
        _card("rtx3090", 24, 35.6, 35.6, 71, 936),
        _card("rtx4060", 8, 15.1, 15.1, 30.2, 272),
        _card("rtx4070", 12, 29.1, 29.1, 58.3, 504),
        _card("rtx4080", 16, 48.7, 48.7, 97.5, 717),
        _card("rtx4090", 24, 82.6, 82.6, 165, 1008),
        _card("rtx5090", 32, 104.8, 104.8, 209.5, 1792),
        _card("l4", 24, 30.3, 60, 121, 300),
        _card("a10", 24, 31.2, 62.5, 125, 600),
        _card("a100-40gb", 40, 19.5, 156, 312, 1555),
        _card("a100-80gb", 80, 19.5, 156, 312, 2039),
        _card("h100", 80, 67, 494, 989, 3350),
        _card("h200", 141, 67, 494, 989, 4800),
        _card("b200", 180, 75, 1100, 2250, 8000),
    )
}


def find_card(name: str) -> Card:
    """A card by name. ValueError for one that is not in the table, with the nearest."""
    key = (
        name.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "").replace("_", "-")
    )
    if key not in CARDS:
        raise ValueError(
            f"gpu: {suggest(key, list(CARDS))}, got {name!r}; any other card: --gpu-memory, and "
            "speeds by running plan on it"
        )
    return CARDS[key]


def this_device(device: torch.device, *, measure: bool = True) -> Card:
    """The device that is there, its rates measured (a few seconds) unless the table has it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = [c for c in CARDS.values() if c.name in properties.name.lower().replace(" ", "")]
        if known and not measure:
            return _with_memory(max(known, key=lambda c: len(c.name)), properties.total_memory)
        found = measure_ceilings(device, quick=True)
        fp32 = found.matmul["fp32"]
        return Card(
            properties.name, properties.total_memory, fp32, found.matmul.get("tf32", fp32),
            found.matmul.get("fp16", fp32), found.copy, measured=True,
            bf16x3=found.matmul.get("bf16x3", 0.0),
        )  # fmt: skip
    found = measure_ceilings(device, quick=True)
    rate = found.matmul["fp32"]
    return Card(
        "CPU", _host_memory(), rate, rate, rate, found.copy, measured=True, on_gpu=False, bf16x3=rate / 3
    )  # fmt: skip


def _with_memory(card: Card, memory: int) -> Card:
    return replace(card, memory=memory)


def card_of_memory(text: str) -> Card:
    """Some card with so much memory, such as '8GiB', of which nothing else is known."""
    some = CARDS["rtx3090"]
    card = Card(f"a card of {text}", parse_bytes("gpu-memory", text), some.fp32, some.tf32, some.fp16,
                some.bandwidth, has_rates=False)  # fmt: skip
    return card


def with_memory(card: Card, text: str) -> Card:
    """The card with another amount of memory, such as '8GiB'."""
    return _with_memory(card, parse_bytes("gpu-memory", text))


def _host_memory() -> int:
    """Free memory of this machine, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 * GIB
