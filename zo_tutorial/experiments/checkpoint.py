"""Checkpoints: all that a killed run needs to go on and end with the same weights, bit for bit."""

import os
import zipfile
from pathlib import Path

import torch

from zo_tutorial.experiments.errors import ExperimentError


def checkpoint_path(out: Path) -> Path:
    """FILE.ckpt beside the record FILE.json."""
    return out.with_suffix(".ckpt")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state under a temporary name and rename it, so that there is always one whole checkpoint.

    state: tensors, numbers, strings, and lists and dicts of these.
    """
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer, interrupted, only complains of its own half-written file
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, identity: dict) -> dict:
    """The state of a run of the same `identity`: its config, data and device.

    Raises ExperimentError where the file is damaged, or belongs to another run; the message names the first difference.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no sums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        written_for = state["identity"]
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExperimentError(f"{path}: damaged, or no checkpoint: {reason}") from error
    for key in identity | written_for:
        there, here = written_for.get(key), identity.get(key)
        if there != here:
            raise ExperimentError(f"{path}: belongs to another run: {key} is {there!r} there and {here!r} here")
    return state
