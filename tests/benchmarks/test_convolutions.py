"""fp32 convolutions by three bf16 products: checked before they are timed, and predicted from data sheets."""

import pytest

from tcm_fast.benchmarks import convolutions
from tcm_fast.benchmarks.convolutions import SITES, Site, check, predicted, time_convolutions
from tcm_fast.benchmarks.results import Results
from tcm_fast.benchmarks.settings import Settings
from tcm_fast.planning.cards import CARDS

SMALL = Site(5, 12, 7, 3)


def test_right_numbers_pass_and_wrong_ones_are_named(monkeypatch):
    assert check(SMALL, "cpu") == ""
    monkeypatch.setattr(
        convolutions, "conv_bf16x3", lambda x, w: 1.001 * convolutions.F.conv2d(x, w, padding=1)
    )
    assert check(SMALL, "cpu").startswith("output is off by")


def test_every_provider_is_timed_in_both_directions(monkeypatch):
    monkeypatch.setattr(convolutions, "SITES", (SMALL,))
    results = Results({}, {})
    time_convolutions(Settings(dry_run=True), results, batch=2)
    assert [(row.provider, row.direction) for row in results.rows] == [
        (name, direction)
        for direction in ("forward", "both")
        for name in ("cudnn fp32", "cudnn tf32", "tcm_fast")
    ]
    assert all(row.samples for row in results.rows)
    assert {row.precision for row in results.rows} == {"fp32", "tf32", "bf16x3"}


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(convolutions, "SITES", (SMALL,))
    monkeypatch.setattr(convolutions, "check", lambda *_: "off")
    results = Results({}, {})
    time_convolutions(Settings(quick=True), results, batch=1)
    ours = [row for row in results.rows if row.provider == "tcm_fast"]
    assert [row.wrong for row in ours] == ["off", "off"]
    assert not any(row.samples for row in ours)


@pytest.mark.parametrize(
    ("card", "ratio"), [("a100-80gb", 5.33), ("h200", 4.92), ("b200", 10), ("rtx4090", 0.67)]
)
def test_predictions_are_the_data_sheets(card, ratio):
    full, expected, fp32, fp32_expected = predicted(SITES[0], 128, CARDS[card])
    assert fp32 / full == pytest.approx(ratio, rel=0.01)
    assert fp32_expected / expected == pytest.approx(ratio / 3, rel=0.01)
