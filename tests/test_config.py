"""Configuration: presets, files, overrides and their errors."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcm_fast.config import (
    PHASES,
    RENAMED,
    Config,
    EctConfig,
    TcmConfig,
    changes,
    from_dict,
    load_config,
    load_preset,
    preset_names,
    save_config,
    to_dict,
)


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_round_trip(name, tmp_path):
    config = load_preset(name)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_cifar10_is_the_published_recipe():
    config = load_preset("cifar10")
    assert (config.steps("ect"), config.steps("tcm")) == (350_000, 300_000)
    assert (config.ect.batch_size, config.tcm.batch_size) == (512, 1024)
    assert (config.ect.lr, config.tcm.lr) == (1e-4, 5e-5)
    assert (config.ect.q, config.ect.stage_iterations, config.ect.max_ratio) == (2.0, 25_000, 0.999)
    assert (config.tcm.t_prime, config.tcm.boundary_fraction, config.tcm.boundary_weight) == (
        1.0,
        0.25,
        0.1,
    )
    assert (config.tcm.student_t_df, config.tcm.t_mean, config.tcm.t_std) == (0.01, 0.0, 0.2)
    assert (config.ect.huber_c, config.ect.weighting) == (1e-8, "inv_dt")
    assert config.edm.ema == ("halflife:500000",)


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
def test_imagenet64_is_the_published_recipe(size):
    config = load_preset(f"imagenet64-{size}")
    assert (config.steps("ect"), config.steps("tcm")) == (150_000, 400_000)
    assert (config.ect.huber_c, config.ect.weighting) == (0.06, "inv_cout_sq")
    assert (config.ect.q, config.ect.stage_iterations, config.ect.max_ratio) == (
        4.0,
        10_000,
        0.9961,
    )
    assert config.tcm.ema == ("power:16.97",)
    assert config.edm.ema == ("power:16.97", "power:6.94")
    assert config.network.class_conditional
    assert config.precision == "fp16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tcm": {"boundry_fraction": 0.1}},
            "tcm.boundry_fraction: unknown, did you mean 'boundary_fraction'",
        ),
        ({"tmc": {}}, "tmc: unknown, did you mean 'tcm'"),
        ({"seed": "one"}, "seed: must be of type int, got 'one'"),
        ({"data": {"flip": 1}}, "data.flip: must be of type bool, got 1"),
        (
            {"precision": "fp8"},
            "precision: must be one of fp32, tf32, fp16, bf16, bf16x3, got 'fp8'",
        ),
        ({"edm": {"betas": [0.9]}}, "edm.betas: needs 2 values, got 1"),
        ({"network": {"channel_mult": 2}}, "network.channel_mult: must be a list, got 2"),
        ({"data": "digits"}, "data: must be a table of fields, got 'digits'"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace("[", r"\[")):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("section", "values", "word"),
    [
        (TcmConfig, {"t_prime": 90.0}, "tcm.t_prime"),
        (TcmConfig, {"t_prime": 0.001}, "tcm.t_prime"),
        (TcmConfig, {"boundary_fraction": 0.0}, "tcm.boundary_fraction"),
        (TcmConfig, {"boundary_fraction": 1.0}, "tcm.boundary_fraction"),
        (EctConfig, {"max_ratio": 1.0}, "ect.max_ratio"),
        (EctConfig, {"q": 1.0}, "ect.q"),
        (EctConfig, {"dropout": 1.0}, "ect.dropout"),
        (EctConfig, {"lr": 0.0}, "ect.lr"),
        (EctConfig, {"ema": ()}, "ect.ema"),
    ],
)
def test_values_out_of_range_are_refused(section, values, word):
    with pytest.raises(ValueError, match=word):
        section(**values)


def test_a_file_starts_from_a_preset(tmp_path):
    """The file's own phases count most, then what it says of all three, then the preset."""
    file = tmp_path / "own.toml"
    file.write_text(
        'base = "imagenet64-xl"\n[consistency]\nhuber_c = 0.1\nlr = 0.5\n'
        "[tcm]\nbatch_size = 64\nlr = 0.25\n[network]\nnum_blocks = 2\n"
    )
    own, base = load_config(file), load_preset("imagenet64-xl")
    assert (own.ect.huber_c, own.tcm.huber_c, own.cd.huber_c, base.tcm.huber_c) == (
        0.1,
        0.1,
        0.1,
        0.06,
    )
    assert (own.ect.lr, own.tcm.lr, base.ect.lr) == (0.5, 0.25, 7e-4)
    assert own.tcm == dataclasses.replace(base.tcm, huber_c=0.1, batch_size=64, lr=0.25)
    assert own.network == dataclasses.replace(base.network, num_blocks=2)
    assert own.edm == base.edm

    file.write_text('base = "imagenet64-xs"\n')
    with pytest.raises(
        ValueError, match=r"base: unknown, did you mean 'imagenet64-.*', got 'imagenet64-xs'"
    ):
        load_config(file)
    file.write_text("[consistency]\nlrr = 1.0\n")
    with pytest.raises(ValueError, match=r"ect\.lrr: unknown, did you mean 'lr'"):
        load_config(file)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_preset("cifar-10")


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: no such file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("seed = ")
    with pytest.raises(ValueError, match=r"bad\.toml cannot be read"):
        load_config(tmp_path / "bad.toml")


def as_an_earlier_version(config):
    """What the version before the fields had their present names would have saved."""
    saved = to_dict(config)
    moments, earlier = saved.pop("moments"), {new: old for old, new in RENAMED.items()}
    saved = {earlier.get(key, key): value for key, value in saved.items()}
    saved |= {"engine": "ddp", "gradients": "fp32", "memory": "given"}
    saved["guard"] |= {"factor": 0.5, "spike": 10.0}
    for name in PHASES:
        phase = {earlier.get(key, key): value for key, value in saved[name].items()}
        phase |= {"weight_norm": "exact", "moments": moments, "eps": 1e-8, "weight_decay": 0.0}
        phase.setdefault("warmup_images", 0)
        if name != "edm":
            phase |= {"t_min": 0.002, "t_max": 80.0, "r_min": 1e-6}
        saved[name] = phase
    saved["ict"] |= {"q": 3.0, "double": 5, "limit": 0.5, "truncate": False, "r_min": 0.0}
    saved["tcm"]["truncate"] = True
    return saved


def test_what_an_earlier_version_saved_is_read(tmp_path):
    path = tmp_path / "config.json"
    config = dataclasses.replace(load_preset("digits"), moments="8bit", keep_checkpoints=5)
    path.write_text(json.dumps(as_an_earlier_version(config)))
    assert load_config(path) == config
    original = dataclasses.replace(config, ect=dataclasses.replace(config.ect, truncate=False))
    saved = as_an_earlier_version(original)
    saved["ect"]["r_min"] = 0.0
    path.write_text(json.dumps(saved))
    assert load_config(path) == original
    assert (original.ect.r_min, config.ect.r_min) == (0.0, 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "fsdp"}, "engine: must be 'ddp', .* no longer supported, got 'fsdp'"),
        ({"gradients": "16bit"}, "gradients: must be 'fp32', .* got '16bit'"),
        ({"guard": {"spike": 5}}, "guard.spike: must be 10.0, .* no longer supported, got 5"),
        ({"edm": {"weight_norm": "fused"}}, "edm.weight_norm: must be 'exact', .* got 'fused'"),
        ({"ect": {"r_min": 0.0}}, r"ect\.r_min: must be 1e-06, .* got 0\.0"),
        ({"ect": {"t_max": 160.0}}, r"ect\.t_max: must be 80\.0, .* got 160\.0"),
        ({"tcm": {"moments": "8bit"}}, "moments: must be the same in all phases"),
    ],
)
def test_what_is_no_longer_supported_is_said(changes, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_field_that_is_gone_is_unknown_in_a_new_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('engine = "ddp"')
    with pytest.raises(ValueError, match="engine: unknown"):
        load_config(path)


def test_a_phase_takes_its_images_or_the_given_steps():
    config = from_dict(Config, {"ect": {"images": 1000, "batch_size": 64}})
    assert config.steps("ect") == 16
    assert dataclasses.replace(config, max_steps=3).steps("ect") == 3


NAMES = st.sampled_from(["seed", "tcm", "phases", "precision", "sede"]) | st.text(
    "abc_.", max_size=8
)


@given(st.dictionaries(NAMES, st.none() | st.integers() | st.text("ab", max_size=4)))
def test_any_table_is_a_configuration_or_a_value_error(values):
    error, config = None, None
    try:
        config = from_dict(Config, values)
    except ValueError as caught:
        error = str(caught)
    if config is None:
        assert any(name in error for name in values)
    else:
        assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_changes():
    before = to_dict(Config())
    after = to_dict(from_dict(Config, {"seed": 3, "tcm": {"lr": 0.5}}))
    assert changes(before, before) == []
    assert changes(before, after) == ["seed 0 -> 3", f"tcm.lr {Config().tcm.lr} -> 0.5"]
    assert changes(json.loads(json.dumps(before)), before) == []
