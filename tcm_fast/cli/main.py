"""The command line: its commands, what their flags default to, and how it ends.

torch is imported when a command runs, not before: `--help` has to come up at once.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any

from tcm_fast.cli import BROKEN_PIPE, INTERRUPTED, USER_MISTAKE
from tcm_fast.cli.bench import Bench, run_bench
from tcm_fast.cli.compare import Compare, run_compare
from tcm_fast.cli.convert import Convert, Ema, run_convert, run_ema
from tcm_fast.cli.data import Data, run_data
from tcm_fast.cli.demo import Demo, run_demo
from tcm_fast.cli.doctor import Doctor, run_doctor
from tcm_fast.cli.edit import Edit, run_edit
from tcm_fast.cli.eval import Eval, SearchTimes, run_eval, run_search
from tcm_fast.cli.features import Features, run_features
from tcm_fast.cli.hub import Pull, Push, run_pull, run_push
from tcm_fast.cli.plan import Plan, run_plan
from tcm_fast.cli.sample import Sample, run_sample
from tcm_fast.cli.train import Train, run_train, train_defaults
from tcm_fast.config import preset_names

with suppress(ModuleNotFoundError):  # only parsing needs it
    from tyro.conf import subcommand

SUMMARY = "Train and sample truncated consistency models: images in one or two network calls."
SPIN_COUNT = "10000"  # GOMP's own is 300,000, and 1,000 where it knows of too few cores

COMMANDS: dict[type, Callable[[Any], int]] = {
    Train: run_train,
    Plan: run_plan,
    Sample: run_sample,
    Edit: run_edit,
    Demo: run_demo,
    Eval: run_eval,
    Compare: run_compare,
    SearchTimes: run_search,
    Data: run_data,
    Features: run_features,
    Ema: run_ema,
    Convert: run_convert,
    Push: run_push,
    Pull: run_pull,
    Bench: run_bench,
    Doctor: run_doctor,
}


def parse(argv: Sequence[str]) -> Any:
    """The command that the arguments ask for. Presets and files are the defaults that flags override."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the command line needs tyro: pip install tyro ({error})", name=error.name
        ) from None
    defaults = {Train: train_defaults(argv), Plan: _plan_defaults(argv)}
    command: Any = None
    for kind in COMMANDS:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
        given = {"default": defaults[kind]} if kind in defaults else {}
        choice = Annotated[kind, subcommand(name, **given)]  # type: ignore[valid-type]
        command = choice if command is None else command | choice
    epilog = f"Presets: {', '.join(preset_names())}."
    return tyro.cli(command, prog="tcm-fast", args=list(argv), description=f"{SUMMARY} {epilog}")


def _plan_defaults(argv: Sequence[str]) -> Plan:
    """What --preset or --config give before any other flag is read."""
    if argv[:1] != ["plan"]:
        return Plan()
    given = [a for a in argv[1:] if a not in ("--out", "--resume")]
    return Plan(settings=train_defaults(["train", *given]).settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one sentence on stderr and exit status 2."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _spin_briefly()
    warnings.formatwarning = lambda message, *_, **__: f"tcm-fast: warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            command = parse(arguments or ["--help"])
            status = COMMANDS[type(command)](command)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if not is_users_mistake(error):
            raise
        print(f"tcm-fast: {error}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _spin_briefly() -> None:
    """Let OpenMP's threads, which torch starts, spin at a barrier for a fraction of a millisecond instead
    of several: long enough for the gaps between a step's operations, too short to take the time of a
    thread that they wait for where the cores are shared. Read when torch is loaded; never over the user's."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def is_users_mistake(error: BaseException) -> bool:
    """Whether our own code raised it, as a message for the user: what a library raises deep inside is a
    defect of ours, and shows its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "tcm_fast"
