"""`tcm-fast demo`: arguments, and the page that they open (the [demo] extra, Gradio). torch is imported when
it runs."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcm_fast.cli.demo_editing import add_editing
from tcm_fast.config import Precision

if TYPE_CHECKING:
    from tcm_fast.networks import Precond

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

MOST_IMAGES, MOST_STEPS = 64, 8
MOST_HEUN_STEPS = 40  # of a pre-trained network
EACH_IN_TURN = -1
HOUR = 3600  # seconds after which the pictures of earlier draws are deleted
STYLE = """
.gradio-container { width: 100%; max-width: 56rem !important; margin: 0 auto; }
.pixels .image-container { padding-top: 2rem; }
.pixels .image-frame, .pixels img { width: 100%; object-fit: contain; image-rendering: pixelated; }
"""


@dataclass
class Demo:
    """A page in the browser: samples in one step beside two, by seed and class (the [demo] extra)."""

    source: Positional[Path]
    """A run, a checkpoint, a network file or hf:user/repo."""
    port: int | None = None
    """By default the first free one from 7860 on."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the page to everybody who reaches this machine."""
    browser: bool = True
    """Open the page in this machine's browser."""
    device: str = "auto"
    precision: Precision | None = None
    """Arithmetic of the network; by default fp16 on a GPU and fp32 elsewhere. bf16x3 is not yet timed on a
    GPU."""


def run_demo(args: Demo) -> int:
    gradio = import_gradio()
    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.runtime.distributed import pick_device

    net = load_network(args.source, device=pick_device(args.device))
    page = build_page(net, args.source.as_posix(), args.precision)
    try:
        _, url, _ = page.launch(
            server_name=args.host, server_port=args.port, inbrowser=args.browser, quiet=True,
            share=False, ssr_mode=False, mcp_server=False, run_history=False, footer_links=[],
            show_error=True, css=STYLE, prevent_thread_lock=True,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except (
        OSError,
        ValueError,
    ) as error:  # a port that is taken, an address that is not this machine's
        raise OSError(f"demo: --host {args.host}, --port {args.port}: {error}") from None
    print(f"{args.source} at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def import_gradio() -> Any:
    """The package, which sends nothing about its use unless GRADIO_ANALYTICS_ENABLED says so."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ModuleNotFoundError(
            f"demo: needs the package gradio ({error}): pip install 'tcm-fast[demo]'"
        ) from None
    return gradio


def build_page(net: Precond, title: str, precision: str | None = None) -> Any:
    """The page of a network, a `gradio.Blocks` that is not launched yet."""
    gradio = import_gradio()
    from tcm_fast.objectives import is_consistency
    from tcm_fast.sampling.image_io import grid
    from tcm_fast.sampling.sampler import sample
    from tcm_fast.sampling.solvers import HEUN_STEPS

    is_few_step = is_consistency(getattr(net, "info", {}).get("phase"))
    fewest, most = (1, MOST_STEPS) if is_few_step else (2, MOST_HEUN_STEPS)
    defaults = (1, 2) if is_few_step else (HEUN_STEPS // 2, HEUN_STEPS)

    def draw(seed: int | None, label: int, num: int, steps: int) -> Any:
        start = time.perf_counter()
        labels = None if label == EACH_IN_TURN else label
        images = sample(net, num, steps=steps, seed=seed or 0, labels=labels, precision=precision)
        seconds = time.perf_counter() - start
        unit = ("step" if is_few_step else "Heun step") + "s" * (steps > 1)
        caption = f"{steps} {unit}: {num} image{'s' * (num > 1)} in {seconds:.2g} s"
        return gradio.update(value=grid(images), label=caption)

    with gradio.Blocks(title=f"tcm-fast: {title}", delete_cache=(HOUR, HOUR)) as page:
        gradio.Markdown(f"### {title}\n{describe(net)}")
        with gradio.Tab("Samples"):
            with gradio.Row():
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                label = gradio.Dropdown(
                    [("each in turn", EACH_IN_TURN), *((name, i) for i, name in enumerate(names(net)))],
                    value=EACH_IN_TURN, label="Class", visible=net.label_dim > 0,
                )  # fmt: skip
                num = gradio.Slider(1, MOST_IMAGES, 25, step=1, label="Images", min_width=240)
            again = gradio.Button("New seed", variant="primary")
            again.click(lambda: random.randrange(2**32), outputs=seed, api_visibility="private")
            with gradio.Row():
                for which, usual in zip(("first", "second"), defaults, strict=True):
                    with gradio.Column(min_width=300):
                        steps = gradio.Slider(
                            fewest, most, usual, step=1, label=f"Steps, {which} grid"
                        )
                        image = gradio.Image(
                            format="png", elem_classes="pixels", buttons=["download", "fullscreen"]
                        )
                    gradio.on(
                        [page.load, seed.change, label.change, num.change, steps.change],
                        draw, [seed, label, num, steps], image, api_name=which,
                        trigger_mode="always_last", concurrency_id="network", concurrency_limit=1,
                    )  # fmt: skip
        if is_few_step:
            with gradio.Tab("Edit"):
                add_editing(gradio, page, net, names(net), precision)
    return page


def names(net: Precond) -> list[str]:
    """The network's classes by name, or by number where it knows no names."""
    known = getattr(net, "info", {}).get("class_names") or ()
    return [str(known[i]) if len(known) == net.label_dim else str(i) for i in range(net.label_dim)]


def describe(net: Precond) -> str:
    """One line: the network, its images, what it was trained for."""
    parts = [
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters",
        f"{net.img_channels} × {net.img_resolution} × {net.img_resolution}",
        f"{net.label_dim} classes" if net.label_dim else "no classes",
    ]
    info = getattr(net, "info", {})
    if info.get("phase"):
        parts.append(f"phase {info['phase']}")
    return ", ".join(parts)
