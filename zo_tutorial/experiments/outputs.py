"""What a run leaves on the disk: its record, its checkpoint, and a lock while it runs.

Of several workers the first one alone reads and writes them, and tells the others what it has read.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from zo_tutorial.experiments.checkpoint import (
    checkpoint_path,
    content,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    start_from,
)
from zo_tutorial.experiments.errors import BusyError, ExperimentError
from zo_tutorial.experiments.record import load_record, save_record
from zo_tutorial.experiments.schema import Config
from zo_tutorial.workers import Workers, launched, restarted

LOCK_SECONDS = 1.0  # that one waits for the lock of another process before it gives up


class Outputs:
    """The files of a run.

    Args:
        out: FILE.json, or None for no files at all.
        init: FILE.ckpt of the run whose weights this one starts from.
        resume: whether the run may go on from files that are there. A run that torchrun starts anew goes on from its
            own ones in any case.

    Attributes:
        weights, digest: those to start from, and their sha256; None where they are drawn.
        finished: the record, where the run is finished already.

    Raises:
        ExperimentError: the run may not write there, or another process is writing there; `init` cannot be used.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path | None,
        init: str | Path | None,
        resume: bool,
        workers: Workers | None,
    ):
        self.config, self.resume, self.workers = config, resume, workers
        self.file = None if out is None else Path(os.path.expanduser(out))
        self.init = None if init is None else Path(os.path.expanduser(init))
        self.first = workers is None or workers.rank == 0
        self.weights, self.digest = None, None
        if self.init is not None:
            self.weights, self.digest = load_weights(self.init, self._told(partial(content, self.init)))
        self.finished: dict | None = json.loads(self._told(lambda: json.dumps(self._check()).encode()))

    def saved(self, identity: dict) -> dict | None:
        """The state in the checkpoint, for a run of this identity; None where it begins anew. See `load_checkpoint`."""
        if self.file is None:
            return None
        path = checkpoint_path(self.file)
        data = self._told(lambda: b"+" + content(path) if self.resume and path.exists() else b"")
        return load_checkpoint(path, data[1:], identity) if data else None

    def begin(self, model: nn.Module) -> None:
        """Give the model the weights to start from. Raises ExperimentError where they do not fit."""
        if self.init is not None and self.weights is not None:
            start_from(model, self.weights, self.init)

    def save(self, state: dict) -> None:
        """Write the checkpoint."""
        if self.file is not None and self.first:
            save_checkpoint(checkpoint_path(self.file), state | {"launched": launched()})

    def write(self, record: dict) -> dict:
        """Write the record; return that of the first worker."""
        if self.workers is not None:
            record = json.loads(self.workers.told(lambda: json.dumps(record).encode()))
        if self.file is not None and self.first:
            save_record(self.file, record)
        return record

    def _told(self, find: Callable[[], bytes]) -> bytes:
        return find() if self.workers is None else self.workers.told(find)

    def _check(self) -> dict | None:
        """The record of a run that is finished already."""
        out, resume = self.file, self.resume
        if out is None:
            if resume:
                raise ExperimentError(
                    "a run resumes from the checkpoint beside its record: say which, by --out FILE.json"
                )
            return None
        if out.suffix != ".json" or out.is_dir():
            raise ExperimentError(f"{out}: the record should be a file whose name ends in .json")
        if not out.parent.is_dir():
            raise ExperimentError(f"{out}: the folder {out.parent} does not exist")
        checkpoint = checkpoint_path(out)
        if restarted() and not resume and checkpoint.exists():
            with suppress(ExperimentError):
                self.resume = resume = load_checkpoint(checkpoint, content(checkpoint), None)["launched"] == launched()
        if resume and out.exists():
            record = load_record(out)
            if record["config_hash"] != self.config.hash():
                raise ExperimentError(f"{out}: is the record of another run, of {record['name']}")
            if record.get("init") != self.digest:
                raise ExperimentError(f"{out}: is the record of a run that started from other weights")
            return record
        for path in () if resume else (out, checkpoint):
            if path.exists():
                raise ExperimentError(f"{path}: exists already; resume that run, delete it or choose another record")
        return None


@contextmanager
def outputs(
    config: Config, out: str | Path | None, init: str | Path | None, resume: bool, workers: Workers | None
) -> Iterator[Outputs]:
    """The files of a run, which no other process writes in the meantime; see `Outputs`."""
    file = None if out is None else Path(os.path.expanduser(out))
    with ExitStack() as stack:
        usable = file is not None and file.suffix == ".json" and file.parent.is_dir()
        if file is not None and usable and (workers is None or workers.rank == 0):
            stack.enter_context(_locked(file))
        yield Outputs(config, out, init, resume, workers)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold FILE.lock, which the system gives back when a process ends, however it does."""
    path = file.with_name(f"{file.name}.lock")
    try:
        path.open("ab").close()
    except OSError as error:
        raise ExperimentError(f"{file}: cannot be written: {error.strerror}") from error
    lock = FileLock(path)
    try:
        # a killed process whose child had not yet become another program (git, say) holds it some milliseconds longer
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.01)
    except Timeout:
        raise BusyError(f"{file}: another process is writing it") from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()
