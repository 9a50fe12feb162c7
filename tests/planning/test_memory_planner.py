"""What fits and how long it takes: cards, memory optimizations chosen, speeds computed."""

from dataclasses import replace

import pytest

from tcm_fast.config import Config, from_dict, load_preset
from tcm_fast.planning.cards import CARDS, GIB, card_of_memory, find_card, with_memory
from tcm_fast.planning.memory_estimate import ImageShape, memory
from tcm_fast.planning.memory_planner import (
    DoesNotFitError,
    choose_optimizations,
    chosen_optimizations,
    mean_work,
    needed,
    plan_run,
)

SMALL = {
    "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip
PHASE = {"batch_size": 64, "images": 64 * 50, "ema": ["power:6.94"]}
SHAPE = ImageShape(16, 3, 0, 1000)


def small(**changes):
    pairs = PHASE | {"stage_iterations": 10, "max_ratio": 0.95}
    values = {"network": SMALL, "edm": PHASE, "ect": pairs, "tcm": pairs} | changes
    return from_dict(Config, values)


def card(memory, name="rtx3060"):
    """With so many bytes for tensors."""
    return replace(CARDS[name], memory=int((memory + 0.375 * GIB) / (1 - 3 / 64)) + 1)


# ---- cards --------------------------------------------------------------------------------------


def test_bf16x3_is_advised_where_data_sheets_promise_speed_and_never_on_rtx_cards():
    gaining = {name for name, card in CARDS.items() if card.gains_by_bf16x3}
    assert gaining == {"a100-40gb", "a100-80gb", "h100", "h200", "b200"}
    ratio = CARDS["a100-80gb"].flops("bf16x3") / CARDS["a100-80gb"].flops("fp32")
    assert ratio == pytest.approx(312 / 3 / 19.5 / 3)  # a third of what the data sheet promises
    measured = replace(CARDS["rtx4090"], measured=True, bf16x3=2 * CARDS["rtx4090"].fp32)
    assert measured.gains_by_bf16x3
    assert not replace(measured, on_gpu=False).gains_by_bf16x3
    assert not card_of_memory("8GiB").gains_by_bf16x3


def test_bf16x3_is_counted_as_fp32s_convolutions_and_takes_its_parts_memory():
    plain, split = (
        plan_run(small(precision=precision), SHAPE, CARDS["a100-80gb"])
        for precision in ("fp32", "bf16x3")
    )
    for a, b in zip(plain.phases, split.phases, strict=True):
        assert b.rate > a.rate
        assert 0 < b.memory.total - a.memory.total < 0.2 * a.memory.total


def test_what_is_left_of_a_cards_memory():
    assert find_card("rtx4060").usable / GIB == pytest.approx(7.25)
    assert find_card("rtx4090").usable / GIB == pytest.approx(22.5)


@pytest.mark.parametrize("name", ["RTX 4090", "GeForce RTX 4090", "nvidia rtx4090"])
def test_cards_are_known_by_many_names(name):
    assert find_card(name) is CARDS["rtx4090"]


def test_unknown_cards_and_amounts():
    with pytest.raises(ValueError, match=r"gpu: .*rtx4090.*any other card: --gpu-memory"):
        find_card("rtx409")
    assert card_of_memory("8GiB").memory == 8 * GIB
    assert not card_of_memory("8GiB").has_rates
    assert with_memory(CARDS["l4"], "10GiB").memory == 10 * GIB
    with pytest.raises(ValueError, match="gpu-memory: must be an amount of memory"):
        card_of_memory("lots")


# ---- memory optimizations -----------------------------------------------------------------------


def test_no_lever_where_there_is_room():
    found = choose_optimizations(small(), SHAPE, CARDS["h200"])
    assert chosen_optimizations(found) == {}
    assert found.micro_batches == 1


def test_levers_one_by_one_as_memory_shrinks():
    """What is chosen always fits; less memory is never faster; the mathematics stays."""
    config = small()
    whole = needed(memory(config, "tcm", SHAPE, on_gpu=True))
    speeds, used = [], []
    for share in (1.1, 0.7, 0.5, 0.35):
        tight = card(whole * share)
        found = choose_optimizations(config, SHAPE, tight)
        plan = plan_run(found, SHAPE, tight)
        assert plan.peak <= tight.usable
        speeds.append(plan.seconds)
        used.append(chosen_optimizations(found))
        for name in config.phases:
            assert found.phase(name) == config.phase(name)
        assert found.precision == config.precision
    assert used[0] == {}
    assert all(used[1:])
    assert speeds == sorted(speeds)


def test_what_cannot_fit_says_what_would():
    config = small(network=SMALL | {"model_channels": 128})
    with pytest.raises(
        DoesNotFitError, match=r"with every memory optimization it takes .* GiB would do"
    ) as error:
        choose_optimizations(config, SHAPE, card(2**20))
    assert "--precision fp16 takes about half" in str(error.value)


def test_several_cards_share_a_batch():
    config = small()
    one, two = (plan_run(config, SHAPE, CARDS["rtx3090"], gpus=n) for n in (1, 2))
    assert two.phases[0].rows == one.phases[0].rows // 2
    assert one.phases[0].rate < two.phases[0].rate <= 2 * one.phases[0].rate
    assert two.phases[0].memory.activations < one.phases[0].memory.activations


# ---- speed --------------------------------------------------------------------------------------


def test_rates_that_were_measured_count():
    plan = plan_run(small(), SHAPE, CARDS["l4"], rates={"edm": 123.0})
    assert plan.phases[0].rate == 123.0
    assert plan.phases[0].seconds == pytest.approx(3200 / 123)
    assert plan.phases[1].rate != 123.0


def test_a_faster_card_and_less_precision_are_faster():
    config = load_preset("cifar10")
    shape = ImageShape(32, 3, 10, 50_000)
    seconds = [plan_run(config, shape, CARDS[n]).seconds for n in ("rtx3060", "rtx3090", "rtx4090")]
    assert seconds == sorted(seconds, reverse=True)
    half = plan_run(replace(config, precision="bf16"), shape, CARDS["rtx4090"])
    assert half.seconds < 0.75 * seconds[-1]


def test_the_schedules_start_is_cheaper_than_its_end():
    assert mean_work(small(), "edm") == 1.0
    assert 0.6 < mean_work(small(), "ect") < 1.0
