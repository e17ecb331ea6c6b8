"""The record of a finished run: a JSON file that says what was run, on what, and what came out."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.files import replacing

# What every record holds. `queries` are loss queries, `seconds` those spent in training steps; `curve` is a list of
# {epoch, queries, seconds, loss, val_…}, with each metric on the validation part: one entry an epoch, and five within
# the first one, whose epoch is a fraction, if it has 32 steps or more. `loss` is the mean since the epoch began.
FIELDS = (
    "name",
    "config",
    "config_hash",
    "seed",
    "data",
    "parameters",
    "trained_parameters",
    "queries",
    "seconds",
    "best_epoch",
    "curve",
    "versions",
    "machine",
    "commit",
)
# A run that started from other weights than random ones has their sha256 too, as `init`.
# And what the best epoch got, as fractions: of MNIST the accuracies, of ATIS the metrics of
# `zo_tutorial.experiments.metrics`, with those of the majority answer.
RESULTS = {"MNIST": ("val_accuracy", "test_accuracy"), "ATIS": ("validation", "test", "baseline")}

# What a record of several workers holds too. `bytes_sent`: of losses, by all workers together.
SHARED = ("workers", "share", "bytes_sent")


def save_record(path: Path, record: dict) -> None:
    """Write a record under a temporary name and rename it, so that there is never half a record."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def load_record(path: str | Path) -> dict:
    """Read a record. Raises ExperimentError where there is none, or where it is damaged."""
    try:
        record = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path}: no record can be read: {error}") from error
    known = record if isinstance(record, dict) else {}
    results = RESULTS["ATIS" if "baseline" in known else "MNIST"]
    missing = [field for field in FIELDS + results if field not in known]
    if missing:
        raise ExperimentError(f"{path}: is no record: {', '.join(missing)} missing")
    return record


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    packages = ("zo_tutorial", "torch", "numpy", "tensorly", "mlxtend")
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in packages}


def machine(device: torch.device) -> str:
    """The machine in words: "Intel Xeon …, 2 cores, 2 threads"; on a GPU its name too."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # Linux
        lines = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = lines[0] if lines else cpu
    words = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{words}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else words


def commit() -> str | None:
    """The commit of the source tree that the package runs from, with "-dirty" where files differ from it.

    None for an installed package, or without git.
    """
    tree = Path(__file__).parents[2]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (tree / ".git").exists():
        return None
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
