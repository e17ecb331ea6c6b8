"""Checkpoints: all that a killed run needs to go on and end with the same weights, bit for bit, or to start another."""

import hashlib
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.record import load_record


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
    state = _read(path)
    for key in identity | state["identity"]:
        there, here = state["identity"].get(key), identity.get(key)
        if there != here:
            raise ExperimentError(f"{path}: belongs to another run: {key} is {there!r} there and {here!r} here")
    return state


def finished_record(config_hash: str, out: Path | None, resume: bool, init: str | None) -> dict | None:
    """The record of a run that is to resume and is finished already.

    Raises ExperimentError where the run may not write.
    """
    if out is None:
        if resume:
            raise ExperimentError("a run resumes from the checkpoint beside its record: say which, by --out FILE.json")
        return None
    if out.suffix != ".json" or out.is_dir():
        raise ExperimentError(f"{out}: the record should be a file whose name ends in .json")
    if not out.parent.is_dir():
        raise ExperimentError(f"{out}: the folder {out.parent} does not exist")
    if resume and out.exists():
        record = load_record(out)
        if record["config_hash"] != config_hash:
            raise ExperimentError(f"{out}: is the record of another run, of {record['name']}")
        if record.get("init") != init:
            raise ExperimentError(f"{out}: is the record of a run that started from other weights")
        return record
    for path in () if resume else (out, checkpoint_path(out)):
        if path.exists():
            raise ExperimentError(f"{path}: exists already; resume that run, delete it or choose another record")
    return None


def load_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a run's best epoch, where there is none yet those of its last step; and their sha256.

    Raises ExperimentError where the file is damaged, or no checkpoint.
    """
    state = _read(path)
    try:
        weights = state["progress"]["best"].get("model", state["model"])
        digest = hashlib.sha256()
        for name, value in weights.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
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


def _read(path: Path) -> dict:
    """A checkpoint's state. Raises ExperimentError where the file is damaged, or none."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no sums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state["identity"], dict):
            raise ValueError("it names no run")
        return state
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ExperimentError(f"{path}: damaged, or no checkpoint: {reason}") from error
