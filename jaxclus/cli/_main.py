"""Entry point: parses the command, prepares JAX, turns errors into one line and an exit code."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from jaxclus import runs
from jaxclus.cli._attack import Attack
from jaxclus.cli._data import Data
from jaxclus.cli._demo import Demo
from jaxclus.cli._evaluate import Evaluate
from jaxclus.cli._linearize import Linearize
from jaxclus.cli._report import Report
from jaxclus.cli._train import Train
from jaxclus.cli._zoo import Zoo
from jaxclus.training import Preempted, TrainingDiverged

_COMMANDS = {
    "train": Train,
    "attack": Attack,
    "evaluate": Evaluate,
    "linearize": Linearize,
    "report": Report,
    "data": Data,
    "zoo": Zoo,
    "demo": Demo,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: the words after `jaxclus`; default: those of the process.

    Returns:
        0 for success, 1 for an error, 130 after Ctrl-C, 143 after SIGTERM. (A command line that
        cannot be parsed exits with 2.)
    """
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="jaxclus",
            description="Adversarial robustness through clustering, in JAX and Flax.",
            args=args,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        _keep_compiled_code()
        command.run()
    except Preempted as error:
        print(f"jaxclus: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("jaxclus: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, TrainingDiverged) as error:
        if os.environ.get("JAXCLUS_TRACEBACK"):
            raise
        print(f"jaxclus: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _keep_compiled_code() -> None:
    """Compiled programs outlive the process, apart for each machine type and version of JAX."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        # Not by backend: asking for it starts it, too early for the XLA_FLAGS that a command sets.
        # JAX's own keys tell backends apart.
        kind = f"{platform.machine()}-{jax.__version__}-{_cpu_flags()}"
        jax.config.update("jax_compilation_cache_dir", str(runs.cache_directory() / "xla" / kind))


def _cpu_flags() -> str:
    """A short digest of the CPU's instruction sets: code for another CPU may not run here."""
    import hashlib

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
