"""Files written as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zo_tutorial.experiments.errors import ExperimentError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a temporary name; renamed when all is on the disk.

    Where that fails the file of before stays as it is, and nothing lies beside it.

    Raises ExperimentError, naming the file, where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError | KeyboardInterrupt) else error.__context__
        if isinstance(cause, OSError):
            raise ExperimentError(f"{path}: cannot be written: {cause.strerror}") from error
        if isinstance(cause, KeyboardInterrupt):  # torch's writer, interrupted, only complains of its half-written file
            raise cause from None
        raise
