"""`tcm-fast plan`, as somebody asks who does not know it."""

import re

import numpy as np
import pytest

from tcm_fast.cli.main import main


def ask(capsys, *argv):
    """(exit status, standard output, standard error)."""
    status = 0
    try:
        main(["plan", *argv])
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


@pytest.fixture
def photos(tmp_path):
    """37 images of 32x32."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "photos.npz", images=rng.integers(0, 256, (37, 32, 32, 3), np.uint8))
    return str(tmp_path / "photos.npz")


def test_a_card_that_nobody_has_here(capsys):
    status, out, _ = ask(
        capsys, "--preset", "cifar10", "--gpu", "rtx4060", "--price-per-hour", "0.5"
    )
    assert status == 0
    for word in ("weights", "gradients", "moments", "ema", "frozen", "activations", "usable"):
        assert word in out
    needed = re.search(r"needed, with 6 % for the allocator\s+([\d,\s]+)", out)
    assert max(int(n.replace(",", "")) for n in needed[1].split()) <= 7.25 * 1024
    assert "Memory optimizations: --micro-batches" in out
    assert "cost" in out
    assert "computed from its data sheet" in out


def test_only_its_memory_is_known(capsys):
    status, out, _ = ask(capsys, "--preset", "cifar10", "--gpu-memory", "8GiB")
    assert status == 0
    assert "No times: of this card only the memory is known" in out
    assert "images/s" not in out


def test_a_schedule_for_the_hours(capsys):
    status, out, _ = ask(capsys, "--preset", "cifar10", "--gpu", "rtx4090", "--time-budget", "1")
    assert status == 0
    assert "Longest schedule that fits in 1 h (computed, not run)" in out
    assert "doubling interval" in out
    assert "tcm-fast train --preset cifar10 --data IMAGES --time-budget 1 --memory auto" in out


@pytest.mark.parametrize(
    ("gpu", "precision", "expected"),
    [
        ("a100-80gb", "fp32", "--precision bf16x3 keeps the signal"),
        (
            "a100-80gb",
            "bf16x3",
            "bf16x3 convolves 1.8 times as fast as fp32 on this card, computed",
        ),
        ("rtx4090", "bf16x3", "--precision fp32 is faster"),
        ("rtx4090", "fp32", None),
        ("a100-80gb", "fp16", None),
    ],
)
def test_bf16x3_is_advised_by_card(gpu, precision, expected, capsys):
    _, out, _ = ask(capsys, "--preset", "digits", "--gpu", gpu, "--precision", precision)
    if expected is None:
        assert "bf16x3" not in out
    else:
        assert expected in out
        assert "executed in emulation, not yet timed on a GPU" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--time-budget", "0"], "time_budget: must be positive, got 0"),
        (["--time-budget", "-3"], "time_budget: must be positive, got -3"),
        (["--gpu", "rtx4096"], "gpu: "),
        (["--gpu-memory", "much"], "gpu-memory: must be an amount of memory"),
        (["--gpus", "0"], "gpus: must be at least 1, got 0"),
        (["--price-per-hour", "-1"], "price-per-hour: must not be negative"),
    ],
)
def test_questions_that_make_no_sense(argv, message, capsys):
    given = argv if "--gpu" in argv or "--gpu-memory" in argv else [*argv, "--gpu", "rtx4090"]
    status, _, error = ask(capsys, "--preset", "digits", *given)
    assert status == 2
    assert message in error


def test_a_network_that_cannot_fit(capsys):
    status, _, error = ask(
        capsys, "--preset", "imagenet64-xl", "--gpu", "rtx3090", "--gpu-memory", "4GiB"
    )
    assert status == 2
    assert "does not fit: with every memory optimization it takes" in error
    assert "GiB would do" in error


def test_a_folder_of_37_images(photos, capsys):
    status, out, _ = ask(capsys, "--preset", "cifar10", "--data", photos, "--gpu", "rtx4090")
    assert status == 0
    assert "37 images: each would be seen" in out
    assert "Expect copies of them, not new images" in out
