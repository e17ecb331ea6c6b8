"""Checkpoints: all that a killed run needs to go on and end with the same weights, bit for bit, or to start another."""

import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.files import replacing
from zo_tutorial.workers import numbers_of


def checkpoint_path(out: Path) -> Path:
    """FILE.ckpt beside the record FILE.json."""
    return out.with_suffix(".ckpt")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write the state under a temporary name and rename it, so that there is always one whole checkpoint.

    state: tensors, numbers, strings, and lists and dicts of these.
    """
    with replacing(path) as file:
        torch.save(state, file)


def content(path: Path) -> bytes:
    """The bytes of a checkpoint. Raises ExperimentError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}") from error


def load_checkpoint(path: Path, data: bytes, identity: dict | None) -> dict:
    """The state of a run of the same `identity`: its config, data and device; None: whatever it is.

    data: the bytes of the file.

    Raises ExperimentError where the file is damaged, or belongs to another run; the message names the first difference.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load checks no sums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        written_for = state["identity"]
        if not isinstance(written_for, dict):
            raise ValueError("it names no run")
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExperimentError(f"{path}: damaged, or no checkpoint: {reason}") from error
    wanted = written_for if identity is None else identity
    for key in wanted | written_for:
        there, here = written_for.get(key), wanted.get(key)
        if there != here:
            raise ExperimentError(f"{path}: belongs to another run: {key} is {there!r} there and {here!r} here")
    return state


def load_weights(path: Path, data: bytes) -> tuple[dict[str, Tensor], str]:
    """The weights of a run's best epoch, where there is none yet those of its last step; and their sha256.

    Raises ExperimentError where the file, whose bytes are given, is damaged, or no checkpoint.
    """
    state = load_checkpoint(path, data, None)
    try:
        weights = state["progress"]["best"].get("model", state["model"])
        digest = hashlib.sha256()
        for name, value in weights.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(numbers_of(value))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ExperimentError(f"{path}: damaged, or no checkpoint: {error}") from error
    return weights, digest.hexdigest()


def start_from(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Give a model the weights of another run. Raises ExperimentError where one is missing, or of another shape."""
    mine = model.state_dict()
    for name in mine | weights:
        if name not in weights or name not in mine:
            where = "has none in this model" if name in weights else "is not there"
            raise ExperimentError(f"{path}: does not fit the model: {name} {where}")
        there, here = weights[name], mine[name]
        if there.shape != here.shape:
            shapes = f"{tuple(there.shape)} there and {tuple(here.shape)} here"
            raise ExperimentError(f"{path}: does not fit the model: {name} is {shapes}")
    model.load_state_dict(weights)
