"""Checkpoints: all that a killed run needs to go on and end with the same weights, bit for bit."""

import io
import zipfile
from pathlib import Path

import torch

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.files import replacing


def checkpoint_path(out: Path) -> Path:
    """FILE.ckpt beside the record FILE.json."""
    return out.with_suffix(".ckpt")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state under a temporary name and rename it, so that there is always one whole checkpoint.

    state: tensors, numbers, strings, and lists and dicts of these.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, identity: dict | None, data: bytes | None = None) -> dict:
    """The state of a run of the same `identity`: its config, data and device; None: whatever it is.

    data: the bytes of the file, where they are known.

    Raises ExperimentError where the file is damaged, or belongs to another run; the message names the first difference.
    """
    try:
        data = path.read_bytes() if data is None else data
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load checks no sums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        written_for = state["identity"]
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExperimentError(f"{path}: damaged, or no checkpoint: {reason}") from error
    wanted = written_for if identity is None else identity
    for key in wanted | written_for:
        there, here = written_for.get(key), wanted.get(key)
        if there != here:
            raise ExperimentError(f"{path}: belongs to another run: {key} is {there!r} there and {here!r} here")
    return state
