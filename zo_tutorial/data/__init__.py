"""The data sets of the book, each in full or in a small form that needs no network: see `zo_tutorial.data.mnist`
and `zo_tutorial.data.atis`."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

Root = str | os.PathLike | None


class DataError(ValueError):
    """Data that is missing, damaged or too small for what is asked; the message is one line and names the file."""


class DownloadError(DataError):
    """Data are not in the data folder, and could not be downloaded into it."""


def files_of(
    source: str, root: Root, find: Callable[[Root], dict | None], download: Callable[[Root], dict], instead: str
) -> dict[str, Path] | None:
    """The files of the full data, which `find` looks for in the data folder and `download` puts there.

    None for the source "embedded", and for "auto" where there are none, with a warning that names what is taken then.

    Raises:
        DataError: unknown source.
        DownloadError: no files for the source "full".
    """
    if source not in ("auto", "full", "embedded"):
        raise DataError(f"data source {source!r} is unknown; allowed: auto, full, embedded")
    if source == "embedded":
        return None
    try:
        return find(root) or download(root)
    except DownloadError as error:
        if source == "full":
            raise
        warnings.warn(f"using {instead}, since {error}", stacklevel=3)
        return None
