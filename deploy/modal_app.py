"""A run on Modal's GPUs, from a checkout: `modal run deploy/modal_app.py --preset cifar10 --data photos.zip`.

`data` is a path in the volume (`modal volume put tcm-fast photos.zip`); the run's folder stays there too,
and a second call goes on where the first stopped. Needs `pip install modal`.
"""

import subprocess
from pathlib import Path

import modal

STOPPED, HOURS = 75, 12
CHECKOUT = Path(__file__).parents[1]
VOLUME = Path("/volume")

image = (
    modal.Image.from_registry("nvidia/cuda:12.8.1-devel-ubuntu24.04", add_python="3.12")
    .apt_install("g++")
    .add_local_dir(CHECKOUT, "/src", copy=True, ignore=[".git", ".venv", "build", "runs"])
    .run_commands("cd /src && pip install '.[log,hub,hf]'")
)
app = modal.App("tcm-fast", image=image)
volume = modal.Volume.from_name("tcm-fast", create_if_missing=True)


@app.function(gpu="H200", volumes={str(VOLUME): volume}, timeout=(HOURS + 1) * 3600, retries=3)
def train(preset: str, data: str, run: str) -> None:
    arguments = ["--preset", preset, "--data", data, "--out", f"runs/{run}", "--resume", "auto"]
    limit = ["--stop-after", str(HOURS)]
    status = subprocess.run(["tcm-fast", "train", *arguments, *limit], cwd=VOLUME).returncode
    volume.commit()
    if status not in (0, STOPPED):
        raise RuntimeError(f"tcm-fast train ended with status {status}")


@app.local_entrypoint()
def main(preset: str = "digits", data: str = "digits:train", run: str = "run") -> None:
    train.remote(preset, data, run)
