"""The examples are short, and do what they say."""

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tcm_fast

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_at_most_40_lines_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 40


def test_every_example_is_tried():
    own = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 6
    assert all(f'example("{path.stem}")' in own for path in EXAMPLES)


class Convolution(nn.Conv2d):
    def forward(self, x, c_noise):
        return super().forward(x)


def test_consistency_loss(seed):
    images = torch.rand(32, 3, 8, 8) * 0.2 + 0.3
    network, before = Convolution(3, 3, 3, padding=1), Convolution(3, 3, 3, padding=1)
    losses = example("consistency_loss").train(network, images, steps=200)
    assert all(map(torch.isfinite, torch.tensor(losses)))
    # It maps noise to something like the images, which hardly vary.
    x = 80 * torch.randn(256, 3, 8, 8)
    c_skip, c_out, c_in = tcm_fast.kernels.preconditioning(torch.full((256,), 80.0))
    with torch.no_grad():
        denoised = [c_skip * x + c_out * net(c_in * x, None) for net in (before, network)]
    assert (denoised[1] - 0.4).square().mean() < (denoised[0] - 0.4).square().mean()


def test_fused_optimizer(seed):
    module = example("fused_optimizer")
    model, x = nn.Linear(4, 1), torch.randn(64, 4)
    averages = module.train(model, [(x, x.sum(1, keepdim=True))] * 600, lr=0.03)
    assert torch.allclose(model.weight, torch.ones(1, 4), atol=0.05)
    for ema in averages:
        assert torch.allclose(ema.average[0], torch.ones(1, 4), atol=0.2)
        assert not torch.equal(ema.average[0], model.weight)


def test_sampler():
    module = example("sample_any_denoiser")
    one, two, ode = module.main()
    images = (127.5 * module.YourDenoiser().images + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    expected = images[[0, 1, 0, 1]]
    assert torch.equal(one, expected)
    assert torch.equal(two, expected)
    assert (ode.int() - expected.int()).abs().max() <= 1


def test_accelerate():
    report = example("accelerate_a_unet").main()
    assert not report.left
    notes = [e.note for e in report.replaced if e.kind == "nn.Sequential"]
    assert notes == 2 * ["GroupNorm and SiLU at 0, 3"]


TOY = {"channel_mult": [1], "model_channels": 16, "num_blocks": 1, "attn_resolutions": [8]}


def test_huggingface_accelerate(seed):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    losses = example("huggingface_accelerate").train(images, **TOY)
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)


def test_lightning(seed):
    pytest.importorskip("lightning", reason="lightning is not installed")
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    net = example("lightning_module").train(images, **TOY)
    fresh = tcm_fast.build_network("ddpmpp", img_resolution=8, img_channels=3, **TOY)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in fresh.parameters())
    assert tcm_fast.sample(net, 2).shape == (2, 8, 8, 3)


def test_editing():
    """Of data that is one of two images, what is known of one leaves only that one."""
    pictures, filled, of_rows = example("edit_any_denoiser").main()
    expected = pictures.repeat_interleave(2, 0)
    assert torch.equal(filled[:, :3], expected[:, :3])
    assert (filled.int() - expected.int()).abs().max() <= 1
    assert (of_rows.int() - expected.int()).abs().max() <= 1


# ---- the notebook -------------------------------------------------------------------------------

NOTEBOOK = FOLDER / "digits.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert sum(len(cell["source"]) for cell in code) <= 40


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    # A kernel of this test's own: this Python, whatever kernels and settings the user has.
    kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("DIGITS_IMAGES", "1280")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2  # samples, losses
    assert all(len(picture.convert("L").getcolors()) > 50 for picture in pictures)
    net = tcm_fast.load_network(tmp_path / "runs/digits-notebook")
    assert net.info["phase"] == "tcm"
    assert net.info["images"] == 1280
