"""ATIS from a folder, from the grammar, and from downloads that work and that fail."""

import hashlib
import os
import shutil

import pytest
import torch

from zo_tutorial.data import DataError, atis

real = pytest.mark.skipif(not os.environ.get("ZO_TUTORIAL_DATA"), reason="needs full ATIS in $ZO_TUTORIAL_DATA")

PARTS = {  # three small parts; the test part has an unknown word, tag and intent, and the longest sentence
    "train": [
        ("fly to new york", "O O B-toloc.city_name I-toloc.city_name", "atis_flight"),
        ("boston 747", "B-fromloc.city_name B-aircraft_code", "atis_aircraft"),
        ("fly to boston at 8", "O O B-toloc.city_name O B-depart_time.time", "atis_flight"),
    ],
    "dev": [("new 9 york", "O O O", "atis_aircraft")],
    "test": [
        ("fly to denver", "O O B-toloc.city_name", "atis_meal"),
        ("to to to to to to to", "B-meal I-meal O O O O O", "atis_flight"),
    ],
}


@pytest.fixture
def files(tmp_path):
    """The small parts in a data folder, tmp_path."""
    for part, sentences in PARTS.items():
        (tmp_path / "atis" / part).mkdir(parents=True)
        for name, lines in zip(("seq.in", "seq.out", "label"), zip(*sentences, strict=True), strict=True):
            (tmp_path / "atis" / part / name).write_text("\n".join(lines) + "\n")
    return tmp_path / "atis"


@pytest.fixture
def mirror(files, tmp_path, monkeypatch):
    """The small parts as the public mirror, at another place than the data folder, with their own sums."""
    shutil.move(files, tmp_path / "mirror")
    monkeypatch.setattr(atis, "URL", (tmp_path / "mirror").as_uri())
    sums = {name: hashlib.sha256((tmp_path / "mirror" / name).read_bytes()).hexdigest() for name in atis.FILES}
    monkeypatch.setattr(atis, "FILES", sums)
    return tmp_path / "mirror"


def sentences(data, split):
    return [atis.sentence(data, split, index) for index in range(len(split.intents))]


def check_layout(data):
    """Shapes, types, and what stands where: sentence token, words with tags, padding."""
    length = data.train.tokens.shape[1]
    for split in data[1:4]:
        assert split.tokens.shape == split.slots.shape == (len(split.intents), length)
        assert split.tokens.dtype == split.slots.dtype == split.intents.dtype == torch.int64
        assert (split.tokens[:, 0] == data.words.index("<cls>")).all()
        assert (split.slots[:, 0] == atis.IGNORED).all()
        padding = split.tokens == 0
        assert torch.equal(padding[:, 1:], split.slots[:, 1:] == atis.IGNORED)
        assert (padding[:, 1:].int().diff(dim=1) >= 0).all()  # after the words, never between them
        assert (~padding[:, 1]).all() and (split.tokens[:, 1:] != 2).all()
        assert split.tokens.max() < len(data.words) and split.slots.max() < len(data.tags)
        assert 0 <= split.intents.min() and split.intents.max() < len(data.intents)
    used = data.train.slots[data.train.slots != atis.IGNORED]
    assert (data.train.tokens[:, -1] != 0).any()  # the longest training sentence fills its row
    # every id but the reserved ones occurs in training: the names come from there, and from there only
    assert data.train.tokens.unique().tolist() == [0, *range(2, len(data.words))]
    assert used.unique().tolist() == list(range(1, len(data.tags)))
    assert data.train.intents.unique().tolist() == list(range(1, len(data.intents)))
    assert data.words[:3] == ("<pad>", "<unk>", "<cls>") and data.tags[0] == data.intents[0] == "UNK"


def test_full_from_a_folder(files, tmp_path):
    data = atis.load("full", tmp_path)
    assert data.source == "full"
    check_layout(data)
    assert data.words[3:] == ("0", "at", "boston", "fly", "new", "to", "york")
    assert data.intents == ("UNK", "atis_aircraft", "atis_flight")
    assert len(data.tags) == 1 + 6 and "B-meal" not in data.tags
    words, tags = atis.sentence(data, data.train, 0)
    assert (" ".join(words), " ".join(tags)) == PARTS["train"][0][:2]
    assert data.train.tokens[0].tolist() == [2, 6, 8, 7, 9, 0]
    assert data.train.slots[0, 1:].tolist() == [*(data.tags.index(tag) for tag in tags), -100]
    assert atis.sentence(data, data.train, 1)[0] == ["boston", "0"]
    assert [data.intents[index] for index in data.train.intents] == ["atis_flight", "atis_aircraft", "atis_flight"]


def test_what_training_does_not_know_is_unk_and_long_sentences_are_cut(files, tmp_path):
    data = atis.load("auto", tmp_path)
    assert atis.sentence(data, data.validation, 0) == (["new", "0", "york"], ["O", "O", "O"])
    assert atis.sentence(data, data.test, 0)[0] == ["fly", "to", "<unk>"]
    assert atis.sentence(data, data.test, 1) == (["to"] * 5, ["UNK", "UNK", "O", "O", "O"])  # of 7 words
    assert data.test.intents.tolist() == [0, data.intents.index("atis_flight")]


def test_the_environment_names_the_folder(files, tmp_path, monkeypatch):
    monkeypatch.setenv("ZO_TUTORIAL_DATA", str(tmp_path))
    data = atis.load("auto")
    assert data.source == "full" and len(data.train.intents) == 3


def test_a_tilde_is_the_home_folder(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("ZO_TUTORIAL_DATA", f"~/{tmp_path.name}")
    assert atis.load("auto").source == atis.load("full", f"~/{tmp_path.name}").source == "full"


@pytest.mark.parametrize("name", ["seq.in", "seq.out", "label"])
@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_a_byte_order_mark_is_no_part_of_a_word(files, tmp_path, part, name):
    without = atis.load("full", tmp_path)
    path = files / part / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = atis.load("full", tmp_path)
    assert marked[4:] == without[4:]  # the names
    for ours, theirs in zip(marked[1:4], without[1:4], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_majority(files, tmp_path):
    data = atis.load("full", tmp_path)
    intent, tag = atis.majority(data.train)
    assert (data.intents[intent], data.tags[tag]) == ("atis_flight", "O")
    data = atis.load("embedded")
    intent, tag = atis.majority(data.train)
    assert (data.intents[intent], data.tags[tag]) == ("atis_flight", "O")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train/seq.out", "O O\nO O\n", "train is inconsistent, by number of lines: seq.in 3, seq.out 2, label 3"),
        ("test/label", "atis_meal\n", "test is inconsistent, by number of lines: seq.in 2, seq.out 2, label 1"),
        ("train/seq.out", "O O O O\nO O O\nO O O O O\n", "train/seq.out, line 2: 3 tags for the 2 words"),
        ("train/seq.in", "a b c d\na b\na b c d\n", "train/seq.out, line 3: 5 tags for the 4 words"),
        ("test/seq.out", "O O B\nO O O O O O O\n", "test/seq.out, line 1: 'B' is no tag"),
        ("dev/label", "atis flight\n", "dev/label, line 1: not one intent, but 'atis flight'"),
        ("train/seq.in", "a b c d\n\na b c d e\n", "train/seq.in is damaged: line 2 is empty"),
        ("dev/seq.in", "", "dev/seq.in is damaged: it is empty"),
        ("dev/seq.out", "O O O", "dev/seq.out is damaged: it is empty, or its last line breaks off"),
        ("train/label", b"\xff\xfe\n", "train/label is damaged or cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_never_passed_over(files, tmp_path, name, content, message):
    (files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for source in ("full", "auto"):
        with pytest.raises(DataError) as caught:
            atis.load(source, tmp_path)
        assert f"{files}/{message}" in str(caught.value).replace(os.sep, "/") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(files, tmp_path, offline):
    (files / "dev" / "seq.out").unlink()
    for source in ("full", "auto"):
        with pytest.raises(DataError, match=r"seq.out is missing, though 8 of the 9"):
            atis.load(source, tmp_path)


def test_without_data_and_network(tmp_path, offline):
    root = tmp_path / "nowhere"
    with pytest.raises(atis.DownloadError, match="download failed") as caught:
        atis.load("full", root)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="using synthetic sentences instead of ATIS"):
        data = atis.load("auto", root)
    assert data.source == "synthetic" and not root.exists()


def test_a_download_fills_the_folder(mirror, tmp_path):
    root = tmp_path / "data"
    assert atis.find(root) is None
    assert atis.load("auto", root).source == "full"
    kept = {path.relative_to(root / "atis").as_posix() for path in root.rglob("*") if path.is_file()}
    assert kept == set(atis.FILES)
    shutil.rmtree(mirror)
    assert len(atis.load("full", root).train.intents) == 3


def test_a_download_of_other_files_leaves_nothing(mirror, tmp_path):
    (mirror / "test" / "label").write_text("atis_flight\natis_flight\n")
    with pytest.raises(atis.DownloadError, match="test/label is not the file it was"):
        atis.load("full", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unknown_source():
    with pytest.raises(DataError, match="allowed: auto, full, embedded"):
        atis.load("fulll")


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_layout_and_skew(seed):
    data = atis.load("embedded", seed=seed)
    assert data.source == "synthetic"
    check_layout(data)
    assert tuple(len(split.intents) for split in data[1:4]) == (2000, 250, 250)
    assert len(data.intents) == 1 + 12 and len(data.tags) > 40
    for split in data[1:4]:
        commonest = split.intents.bincount().max() / len(split.intents)
        outside = (split.slots == data.tags.index("O")).sum() / (split.slots != atis.IGNORED).sum()
        assert 0.55 < commonest < 0.77 and 0.5 < outside < 0.7
        assert (split.tokens == 1).float().sum() < 0.01 * (split.tokens > 0).sum()


def test_synthetic_sentences_with_the_names_of_full_ones(files, tmp_path):
    """Each sentence is the same but for words and tags that the full data do not know."""
    own, full = atis.load("embedded"), atis.load("full", tmp_path)
    data = atis.load("embedded", tmp_path, names="full")
    assert data.source == "synthetic" and data[4:] == full[4:]
    assert data.train.tokens.shape == (2000, full.train.tokens.shape[1])
    length = data.train.tokens.shape[1] - 1
    for index in range(50):
        words, tags = atis.sentence(own, own.train, index)
        known = [word if word in full.words else "<unk>" for word in words][:length]
        tags = [tag if tag in full.tags else "UNK" for tag in tags][:length]
        assert atis.sentence(data, data.train, index) == (known, tags)
        intent = own.intents[own.train.intents[index]]
        assert data.intents[data.train.intents[index]] == (intent if intent in full.intents else "UNK")


def test_names_that_cannot_be_had(tmp_path, offline):
    with pytest.raises(DataError, match="names 'mine' are unknown; allowed: own, full"):
        atis.load("embedded", tmp_path, names="mine")
    with pytest.raises(DataError, match=r"no ATIS in .* and the download failed"):
        atis.load("embedded", tmp_path, names="full")


def test_synthetic_parts_share_no_sentence():
    data = atis.load("embedded", seed=4)
    rows = torch.cat([split.tokens for split in data[1:4]])
    assert len(rows.unique(dim=0)) == 2500


def test_synthetic_tags_are_valid_bio():
    data = atis.load("embedded", seed=5)
    for split in data[1:4]:
        for words, tags in sentences(data, split):
            for before, tag in zip(["O", *tags], tags, strict=False):
                assert not tag.startswith("I-") or before[2:] == tag[2:], (words, tags)
            assert not any(mark in word for word in words for mark in "@()|{}")


def test_every_slot_of_the_grammar_is_used():
    data = atis.load("embedded")
    ends = {tag[2:].split(".")[-1] for tag in data.tags if tag.startswith("B-")}
    assert ends == set(atis.PHRASES)
    assert sum(share for share, *_ in atis.GRAMMAR.values()) == 100


def test_the_synthetic_corpus_follows_the_seed():
    first, again, other = (atis.load("embedded", seed=seed) for seed in (1, 1, 2))
    assert first.words == again.words and sentences(first, first.test) != sentences(other, other.test)
    for one, two in zip(first[1:4], again[1:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_synthetic_corpus_is_the_same_everywhere():
    data = atis.load("embedded", seed=0)
    assert " ".join(atis.sentence(data, data.train, 0)[0]) == (
        "which airline flies between orlando and tacoma on december twenty second leaving before noon"
    )
    assert (len(data.words), len(data.tags), data.train.tokens.shape[1]) == (262, 45, 29)


@real
def test_the_official_files():
    data = atis.load("full")
    check_layout(data)
    assert tuple(len(split.intents) for split in data[1:4]) == (4478, 500, 893)
    assert (len(data.words), len(data.tags), len(data.intents)) == (725, 121, 22)
    assert data.train.tokens.shape[1] == 47
    assert [int((split.tokens > 2).sum() + (split.tokens == 1).sum()) for split in data[1:4]] == [50497, 5703, 9164]
    unknown = [((s.tokens == 1).sum(), (s.slots == 0).sum(), (s.intents == 0).sum()) for s in data[2:4]]
    assert [tuple(map(int, counts)) for counts in unknown] == [(26, 1, 1), (53, 6, 5)]
    intent, tag = atis.majority(data.train)
    words = data.test.slots != atis.IGNORED
    assert float((data.test.intents == intent).float().mean()) == pytest.approx(0.7077, abs=1e-4)
    assert float((data.test.slots[words] == tag).float().mean()) == pytest.approx(0.6003, abs=1e-4)
    for name, path in atis.find().items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == atis.FILES[name]
