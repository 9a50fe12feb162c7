"""Our networks in other people's forms."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tcm_fast
from tcm_fast.interchange import convert, export
from tcm_fast.sampling.sampler import NOISE_LAYER, philox_normal, sample


def network(name="ddpmpp", **options):
    torch.manual_seed(5)
    options = {"img_resolution": 8, "img_channels": 3, "model_channels": 16, "num_blocks": 1,
               "channel_mult": [1, 2], "attn_resolutions": [4]} | options  # fmt: skip
    net = tcm_fast.build_network(name, **options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    net.info = {"phase": "tcm", "t_prime": 1.0}
    return net


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_state_dicts_come_back(name, ending, tmp_path):
    net = network(name, label_dim=4, model_channels=64)
    path = tmp_path / f"net{ending}"
    names = export.export_state(net, path, "edm")
    is_file = ending == ".safetensors"
    state = load_file(path) if is_file else torch.load(path, weights_only=True)
    assert list(state) == names == list(net.state_dict()) or sorted(state) == sorted(names)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    if not is_file:
        found, _ = convert.load_foreign(path)
        assert all(
            torch.equal(a, b) for a, b in zip(found.parameters(), net.parameters(), strict=True)
        )


@pytest.mark.parametrize("logvar_channels", [0, 16])
def test_names_of_edm2(logvar_channels, tmp_path):
    net = network("edm2", label_dim=4, model_channels=64, logvar_channels=logvar_channels)
    export.export_state(net, tmp_path / "net.pth", "edm2")
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"} <= set(state)
    assert sum(name.startswith("unet.") for name in state) == len(net.model.state_dict())
    found, _ = convert.load_foreign(tmp_path / "net.pth")
    u = found.log_variance(torch.tensor([0.3, 5.0]))
    if logvar_channels:
        assert torch.equal(u, net.log_variance(torch.tensor([0.3, 5.0])))
    else:
        assert torch.equal(u, torch.zeros(2))


def test_wrong_arguments(tmp_path):
    net = network()
    with pytest.raises(ValueError, match="names edm2 are for an edm2 network, got ddpmpp"):
        export.export_state(net, tmp_path / "a.pth", "edm2")
    with pytest.raises(ValueError, match="must be edm or edm2, got other"):
        export.export_state(net, tmp_path / "a.pth", "other")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pth or \.pt"):
        export.export_state(net, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"must end in \.pt2 or \.onnx"):
        export.export_program(net, tmp_path / "a.ckpt")
    net.info["phase"] = "edm"
    with pytest.raises(ValueError, match="no consistency function"):
        export.export_program(net, tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def noise_of(seed, num, steps, size=(3, 8, 8)):
    """What `sample` draws for a seed's first images."""
    numbers = torch.arange(num)
    return torch.stack(
        [philox_normal(seed, i, NOISE_LAYER, numbers, size) for i in range(steps)], 1
    )


def operations(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    ("name", "steps"), [("ddpmpp", 1), pytest.param("edm2", 2, marks=pytest.mark.slow)]
)
def test_programs_sample_the_same_images(name, steps, tmp_path, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "")
    if name == "edm2":
        net = network(name, label_dim=4, model_channels=64)
    else:
        net = network(name, channel_mult=[1], attn_resolutions=[])
    export.export_program(net, tmp_path / "net.pt2", steps=steps)
    assert os.environ["TCM_FAST_BACKEND"] == ""
    program = torch.export.load(tmp_path / "net.pt2")
    assert not any("tcm_fast" in name for name in operations(program.graph))
    labels = (torch.eye(4)[torch.arange(3)],) if net.label_dim else ()
    found = program.module()(noise_of(7, 3, steps), *labels)
    expected = sample(net, 3, steps=steps, seed=7)
    assert found.dtype == torch.uint8
    # A sum in another order may tip a value over the edge between two bytes.
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert (
        program.module()(noise_of(7, 5, steps), *(torch.eye(4)[[0] * 5] for _ in labels)).shape[0]
        == 5
    )


@pytest.mark.slow
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    net = network()
    export.export_program(net, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    found = ReferenceEvaluator(model).run(None, {"noise": noise_of(7, 3, 1).numpy()})[0]
    difference = (torch.from_numpy(found).int() - sample(net, 3, seed=7).int()).abs()
    assert difference.max() <= 1


# ---- diffusers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from tcm_fast.interchange import diffusers_export

    return diffusers_export


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("adm", {"model_channels": 128, "label_dim": 4}, "UNet2DModel"),
        ("adm", {"model_channels": 128, "channel_mult": [1, 2], "attn_resolutions": [8, 4],
                 "num_blocks": 2}, "UNet2DModel"),
        ("adm", {"model_channels": 64, "label_dim": 4}, "TruncatedConsistencyUNet"),
        ("ddpmpp", {}, "TruncatedConsistencyUNet"),
        ("edm2", {"model_channels": 64, "label_dim": 4}, "TruncatedConsistencyUNet"),
    ],
)  # fmt: skip
def test_folders_of_diffusers_sample_the_same_images(name, options, kind, folders, tmp_path):
    net = network(name, **options)
    assert folders.save_folder(net, tmp_path / "folder") == kind
    pipeline = folders.TruncatedConsistencyPipeline.from_pretrained(tmp_path / "folder")
    labels = [1, 2] if net.label_dim else None
    found = pipeline(
        batch_size=3, num_inference_steps=2, seed=9, class_labels=labels, output_type="pt"
    )
    expected = sample(net, 3, steps=2, seed=9, labels=labels)
    difference = (found.images.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert pipeline(seed=9, class_labels=labels).images[0].size == (8, 8)
    if kind == "UNet2DModel":  # which diffusers loads by itself
        from diffusers import UNet2DModel

        UNet2DModel.from_pretrained(tmp_path / "folder" / "unet")
    with pytest.raises(ValueError, match="lies below t'=1"):
        pipeline(timesteps=[0.5], class_labels=labels)
    with pytest.raises(FileExistsError, match="not empty"):
        folders.save_folder(net, tmp_path / "folder")


# ---- the command line -------------------------------------------------------------------------------


def run(*arguments):
    from tcm_fast.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments)])
    return ended.value.code


def test_there_and_back_by_the_command_line(tmp_path, capsys):
    net = network()
    tcm_fast.save_network(tmp_path / "a.safetensors", net, metadata=net.info)
    assert run(tmp_path / "a.safetensors", tmp_path / "b.pth", "--to", "edm") == 0
    assert (
        run(tmp_path / "b.pth", tmp_path / "c.safetensors", "--phase", "tcm", "--t-prime", "1") == 0
    )
    said = capsys.readouterr().out
    assert "ddpmpp" in said
    assert "trained as: tcm, t' = 1" in said
    found = tcm_fast.load_network(tmp_path / "c.safetensors")
    assert torch.equal(sample(found, 2), sample(net, 2))
    assert run(tmp_path / "b.pth", tmp_path / "c.safetensors") == 2
    assert run(tmp_path / "b.pth", tmp_path / "b.pth", "--to", "edm") == 2
    assert run(tmp_path / "a.safetensors", tmp_path / "d.safetensors") == 2
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(X\x04\x00\x00\x00echotR.")
    assert run(tmp_path / "evil.pkl", tmp_path / "d.safetensors") == 2
    said = capsys.readouterr().err
    assert "it refers to 'os.system', which is not data" in said
    assert "Traceback" not in said


def test_converted_files_are_sampled_from_the_network_alone(tmp_path):
    from tcm_fast.cli.main import main

    net = network()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "n.safetensors", "--phase", "ect") == 0
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "sample",
                str(tmp_path / "n.safetensors"),
                "--num",
                "4",
                "--out",
                str(tmp_path / "s.png"),
            ]
        )
    assert ended.value.code == 0
    assert (tmp_path / "s.png").is_file()


class Other(nn.Module):
    """Somebody's denoiser."""

    img_resolution, img_channels, label_dim = 8, 3, 0

    def forward(self, x, t, labels=None):
        return x / (1 + t[:, None, None, None])


def test_the_sampler_takes_any_denoiser():
    assert sample(Other(), 3, steps=2).shape == (3, 8, 8, 3)
