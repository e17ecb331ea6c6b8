"""ATIS, questions to an air travel service, each with an intent and a slot tag for each word (hemphill1990atis).

`full`: the official 4,478 / 500 / 893 sentences, from the data folder or a public mirror, GitHub's monologg/JointBERT.
`embedded`: 2,000 / 250 / 250 questions that a small grammar makes from a seed, in the same format, without a network.
They are not ATIS and far easier, so `ATIS.source` calls them "synthetic".

The data folder is that of `zo_tutorial.data.mnist`. It holds atis/train, atis/dev and atis/test, in each seq.in,
seq.out and label: one sentence a line, its words, their tags in the BIO scheme, its intent. The files hold numbers as
they were said. A word of digits only is read as "0", because most numbers of the test set do not occur in training.

Full data have 21 intents and 120 slot tags in the training set, 22 and 121 with UNK, and 722 words, 725 with the three
special ones. Of the test set's 9,164 words 53 are unknown, of its tags 6, of its intents 5: those cannot be got right.
"""

import hashlib
import itertools
import os
import random
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_tutorial.data import DataError, DownloadError, files_of
from zo_tutorial.data.mnist import TIMEOUT, folder

PAD, UNKNOWN, SENTENCE = "<pad>", "<unk>", "<cls>"  # words 0, 1 and 2
UNK, UNK_ID = "UNK", 0  # tag 0 and intent 0: no training sentence has it
IGNORED = -100  # target at the sentence token and at padding; cross_entropy's default
SYNTHETIC_SIZES = (2000, 250, 250)
NAMES = ("own", "full")  # of words, tags and intents
Sentence = tuple[list[str], list[str], str]  # words, tags, intent

URL = "https://raw.githubusercontent.com/monologg/JointBERT/master/data/atis"
FILES = {  # sha256 of the mirror's files
    "train/seq.in": "3a670980841b21ab39088b2595efc17d487cdc45769c075a3e5f9458bba28c7f",
    "train/seq.out": "14c7131bd66562f797dbd7189bc7358f0cf354c6afb0785a9ab973c35b58f34c",
    "train/label": "d0a771547665eecbdf9f96ea015ef07d1f6ee9f063e861020dafabb3c2a04377",
    "dev/seq.in": "c7435b96e7948393608c34819628e863c5338f11ca68e8f896d2cc041d8e17f8",
    "dev/seq.out": "83ccff3e36f83a993f8e5b5b82adf3256076f234abda4d784051381d7ac76922",
    "dev/label": "06957cfe6fdffac84f8280bc3a1f8ca85c85631b363817aa4543aac611f8addf",
    "test/seq.in": "4b2119fc59c37f9398c6605db435d4f467505009e6ee3e5af04fed09f39dc397",
    "test/seq.out": "a4690d6bceadc06876d1ff99bc401744aa981cb321e598ae12a3859d7be53254",
    "test/label": "ce4bfe6590d9498e1078f30b4137d3e8b3e94277b444b26360c0bf2e9e282761",
}


class Split(NamedTuple):
    """One part: tokens int64 (N, L), the sentence token, then the words, 0 at padding; slots int64 (N, L), each word's
    tag, IGNORED at the sentence token and at padding; intents int64 (N,)."""

    tokens: Tensor
    slots: Tensor
    intents: Tensor


class ATIS(NamedTuple):
    """The source, "full" or "synthetic", the three parts, and the names of words, tags and intents by id.

    The names are those of the training set, sorted, after <pad>, <unk>, <cls> (words) or UNK (tags, intents). A tag or
    an intent of the other parts that is not among them has id 0, UNK, which training never asks for.
    """

    source: str
    train: Split
    validation: Split
    test: Split
    words: tuple[str, ...]
    tags: tuple[str, ...]
    intents: tuple[str, ...]


def load(
    source: str = "auto", root: str | os.PathLike | None = None, seed: int = 0, names: str = "own"
) -> ATIS:
    """Load ATIS; sentences are in the files' order. Row length L: the longest training sentence + 1 (full: 46 + 1).

    A longer sentence in the other parts loses its end. The official files have none, 35 words being the longest there.

    Args:
        source: "full", with the official parts, "embedded", the synthetic corpus, or "auto": full where the data
            folder has it or the download works, else embedded, with a warning.
        root: the data folder, instead of $ZO_TUTORIAL_DATA or the cache folder. Its files may be one's own: they
            must be consistent and need not be the official ones.
        seed: of the synthetic corpus; full data do not depend on it.
        names: "own", or "full": synthetic sentences with the ids, and the row length, of full ATIS, so that a model
            that has learned them can go on with full ones. What full ATIS does not know is <unk> or UNK: 6 words and
            the tag I-meal.

    Raises:
        DataError: there are no such data, or a file is damaged, which "auto" never passes over.
    """
    if names not in NAMES:
        raise DataError(f"names {names!r} are unknown; allowed: {', '.join(NAMES)}")
    files = files_of(source, root, find, download, "synthetic sentences instead of ATIS")
    if files:
        return _atis("full", [_read(files, part) for part in ("train", "dev", "test")])
    return _atis("synthetic", _synthetic(seed), load("full", root) if names == "full" else None)


def sentence(atis: ATIS, split: Split, index: int) -> tuple[list[str], list[str]]:
    """The words, as the model sees them, and the tags of one sentence, without sentence token and padding."""
    inside = split.slots[index] != IGNORED  # (L,)
    words = [atis.words[token] for token in split.tokens[index][inside].tolist()]
    return words, [atis.tags[tag] for tag in split.slots[index][inside].tolist()]


def majority(train: Split) -> tuple[int, int]:
    """The ids of the commonest intent and the commonest tag of the training set: the answer of the majority baseline.

    On full ATIS (atis_flight and O) it gets 70.77 % of the test set's intents and 60.03 % of its tags.
    """
    return int(train.intents.mode().values), int(train.slots[train.slots != IGNORED].mode().values)


def find(root: str | os.PathLike | None = None) -> dict[str, Path] | None:
    """The nine ATIS files of the data folder by name, or None where there is none of them.

    Raises DataError where there are some, but not all nine.
    """
    paths = {name: folder(root) / "atis" / name for name in FILES}
    found = [name for name, path in paths.items() if path.is_file()]
    for name, path in paths.items():
        if found and name not in found:
            raise DataError(f"{path} is missing, though {len(found)} of the 9 ATIS files are there")
    return paths if found else None


def download(root: str | os.PathLike | None = None) -> dict[str, Path]:
    """Download ATIS into the data folder (1 MB) and return its files, as `find` does.

    Nothing is written before all nine files are there with the right sha256. Raises DownloadError.
    """
    target = folder(root) / "atis"
    contents = {}
    try:
        for name, digest in FILES.items():
            with urllib.request.urlopen(f"{URL}/{name}", timeout=TIMEOUT) as answer:
                contents[name] = answer.read()
            if hashlib.sha256(contents[name]).hexdigest() != digest:
                raise DownloadError(f"{URL}/{name} is not the file it was, by its sha256")
        for name, content in contents.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / f"{name}.part").write_bytes(content)
        return {name: (target / f"{name}.part").replace(target / name) for name in contents}
    except Exception as error:  # a download can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"no ATIS in {folder(root)} and the download failed: {reason}") from error


def _read(files: dict[str, Path], part: str) -> list[Sentence]:
    """The sentences of one part, in order. Raises DataError where its files are damaged or do not fit together."""
    paths = [files[f"{part}/{name}"] for name in ("seq.in", "seq.out", "label")]
    lines = [_lines(path) for path in paths]
    if len({len(each) for each in lines}) > 1:
        counts = "seq.in {}, seq.out {}, label {}".format(*map(len, lines))
        raise DataError(f"{paths[0].parent} is inconsistent, by number of lines: {counts}")
    sentences = []
    for number, (words, tags, intent) in enumerate(zip(*lines, strict=True), 1):
        if len(words) != len(tags):
            raise DataError(f"{paths[1]}, line {number}: {len(tags)} tags for the {len(words)} words of seq.in")
        for tag in tags:
            if not re.fullmatch("O|[BI]-.+", tag):
                raise DataError(f"{paths[1]}, line {number}: {tag!r} is no tag; allowed: O, B-…, I-…")
        if len(intent) != 1:
            raise DataError(f"{paths[2]}, line {number}: not one intent, but {' '.join(intent)!r}")
        sentences.append((_normalised(words), tags, intent[0]))
    return sentences


def _lines(path: Path) -> list[list[str]]:
    """The lines of a file, split at white space. Raises DataError where a line, or the file, is empty.

    A byte order mark, which some editors put at the start, is no part of the first line.
    """
    try:
        *lines, rest = (line.split() for line in path.read_text(encoding="utf-8-sig").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or cannot be read: {error}") from error
    if rest or not lines:
        raise DataError(f"{path} is damaged: it is empty, or its last line breaks off without a line end")
    if [] in lines:
        raise DataError(f"{path} is damaged: line {lines.index([]) + 1} is empty")
    return lines


def _normalised(words: list[str]) -> list[str]:
    return ["0" if word.isdigit() else word for word in words]


def _atis(source: str, parts: list[list[Sentence]], like: ATIS | None = None) -> ATIS:
    """Number words, tags and intents by the first part, or as others are, and encode all three parts."""
    found = [{word for words, _, _ in parts[0] for word in words}]
    found += [{tag for _, tags, _ in parts[0] for tag in tags}, {intent for _, _, intent in parts[0]}]
    special = [(PAD, UNKNOWN, SENTENCE), (UNK,), (UNK,)]
    names = [(*first, *sorted(others)) for first, others in zip(special, found, strict=True)]
    length = 1 + max(len(words) for words, _, _ in parts[0])
    if like is not None:
        names, length = [like.words, like.tags, like.intents], like.train.tokens.shape[1]
    ids = [{name: index for index, name in enumerate(each)} for each in names]
    train, validation, test = (_encode(part, length, *ids) for part in parts)
    return ATIS(source, train, validation, test, *names)


def _encode(part: list[Sentence], length: int, words: dict, tags: dict, intents: dict) -> Split:
    def padded(rows, padding):
        return torch.tensor([(row + [padding] * length)[:length] for row in rows])  # (N, L)

    tokens = [[words[SENTENCE], *(words.get(word, words[UNKNOWN]) for word in row)] for row, _, _ in part]
    slots = [[IGNORED, *(tags.get(tag, tags[UNK]) for tag in row)] for _, row, _ in part]
    targets = torch.tensor([intents.get(intent, intents[UNK]) for _, _, intent in part])
    return Split(padded(tokens, words[PAD]), padded(slots, IGNORED), targets)


# The grammar of the synthetic corpus. (a|b|) stands for one of its alternatives, here the last is empty; @slot for a
# phrase from the list of the slot's last part. A list's first phrases are the commonest, none is twice in a sentence.
PHRASES = {
    "city_name": "boston|denver|san francisco|atlanta|pittsburgh|dallas|baltimore|philadelphia|washington|oakland"
    "|new york|st. louis|milwaukee|charlotte|phoenix|salt lake city|miami|detroit|las vegas|chicago|seattle|houston"
    "|memphis|los angeles|kansas city|toronto|san diego|cleveland|orlando|st. paul|montreal|nashville|tacoma|newark",
    "airport_name": "logan airport|general mitchell international|love field|stapleton airport|la guardia",
    "airport_code": "bwi|dfw|sfo|jfk|atl|bna|ewr|mco|ord|yyz",
    "day_name": "monday|wednesday|sunday|friday|saturday|thursday|tuesday",
    "month_name": "june|july|august|september|may|december|april|november",
    "day_number": "first|second|third|fifth|tenth|twelfth|sixteenth|twentieth|twenty second|thirtieth",
    "today_relative": "tomorrow|today|tonight",
    "period_of_day": "morning|afternoon|evening|night",
    "time": "8 am|6 pm|noon|5 o'clock|midnight",
    "time_relative": "before|after|by|around|at",
    "airline_name": "united|delta|american airlines|us air|continental airlines|united airlines|twa|lufthansa"
    "|northwest airlines|american|canadian airlines international|eastern",
    "class_type": "first class|coach|business class|economy|thrift",
    "round_trip": "round trip|one way",
    "cost_relative": "cheapest|lowest|least expensive|most expensive|cheap",
    "fare_amount": "300 dollars",
    "fare_basis_code": "q|qx|y|f|qo|fn|h|bh|yn",
    "flight_mod": "first|earliest|last|latest|next",
    "flight_stop": "nonstop|direct|one stop",
    "meal": "breakfast|dinner|lunch|a snack",
    "transport_type": "limousine|rental car|taxi|car|bus|train",
    "aircraft_code": "747|dc10|m80|d9s|f28|j31|l10|73s",
}
ASK = "((please|) (show|list|give|find) me|what are|i (would like|want|need) (to see|)|(can|could) you (show|tell) me|)"
FROM, TO = "(from|leaving) @fromloc.city_name", "(to|to|into) @toloc.city_name"
ROUTE = f"({FROM} {TO}|{FROM} {TO}|{TO} {FROM}|between @fromloc.city_name and @toloc.city_name)"
DATE = "(@depart_date.day_name|) @depart_date.month_name @depart_date.day_number"
DAY = f"(on @depart_date.day_name|@depart_date.today_relative|on {DATE}|)"
ARRIVE = "(arriving|that arrive) (@arrive_time.time_relative @arrive_time.time|in the @arrive_time.period_of_day)"
TIME = f"(in the @depart_time.period_of_day|leaving @depart_time.time_relative @depart_time.time|{ARRIVE}||)"
KIND = "(@flight_stop|@flight_mod|@cost_relative|@round_trip|@class_type|@airline_name||)"
STOP = "with a (stop|stopover) in @stoploc.city_name"
HOW = f"(on @airline_name|{STOP}|(that serve|with) @meal|that cost less than @fare_amount|||)"
WHEN = f"{ROUTE} {DAY} {TIME}"
GRAMMAR: dict[str, tuple[Any, ...]] = {  # intent: its share in per cent, then its patterns
    "flight": (
        66,
        f"{ASK} (all the|the|) {KIND} flights {WHEN} {HOW}",
        f"i (would like|want|need) to (fly|go|travel) {WHEN} {HOW}",
        f"(is there a {KIND} flight|are there any {KIND} flights) {WHEN} {HOW}",
        f"(which|what) flights (leave|depart) @fromloc.city_name and arrive in @toloc.city_name {DAY} {TIME}",
    ),
    "airfare": (
        9,
        f"{ASK} the (@cost_relative|) (@round_trip|@class_type|) (fare|fares|airfare) {ROUTE} {DAY} {HOW}",
        f"how much is a (@class_type|@round_trip|) (ticket|flight) {ROUTE} (on @airline_name|) {DAY}",
    ),
    "ground_service": (
        6,
        f"{ASK} (the|any|) ground transportation (in|for|from the airport in) @city_name",
        "(is there|do you have) a @transport_type (service|) (from @airport_name to downtown|in) @city_name",
    ),
    "airline": (4, f"(which|what) (airline flies|airlines fly|airlines go) {WHEN}"),
    "abbreviation": (
        4,
        "what (does|is) (the|) (fare code|code|booking code|) @fare_basis_code (mean|stand for|)",
        "(what is|explain|what does) (the|) (airport code|abbreviation|) @airport_code (mean|stand for|)",
    ),
    "aircraft": (3, f"(what|which) (kind|type) of (aircraft|plane|airplane) is used {WHEN}"),
    "flight_time": (2, f"{ASK} the (flight|departure|arrival) (time|times) {ROUTE} {DAY} (on @airline_name|)"),
    "quantity": (2, f"how many {KIND} flights (are there|leave|does @airline_name have) {ROUTE}"),
    "airport": (1, f"(where is|{ASK}) the (airport|airports|name of the airport) (in|at|near) @city_name"),
    "distance": (1, "how (far|many miles) is it from (@airport_name|@fromloc.city_name) to @toloc.city_name"),
    "capacity": (1, "how many (seats|people|passengers) (are|fit|can fly) on (a|an) (@airline_name|) @aircraft_code"),
    "ground_fare": (1, "(what|how much) is the (cost|price|fare) (of|for) a @transport_type (ride|) in @city_name"),
}


def _synthetic(seed: int) -> list[list[Sentence]]:
    """The three parts. No two sentences have the same words, so no test sentence is known from training."""
    rng = random.Random(seed)  # its random() is the same in every version of Python
    intents = [intent for intent, (share, *_) in GRAMMAR.items() for _ in range(share)]  # 100 of them
    sentences: dict[str, Sentence] = {}
    while len(sentences) < sum(SYNTHETIC_SIZES):
        intent = _pick(rng, intents)
        words = None
        while words is None or " ".join(words) in sentences:
            words, tags = _question(rng, _pick(rng, GRAMMAR[intent][1:]))
        sentences[" ".join(words)] = words, tags, f"atis_{intent}"
    parts = iter(sentences.values())
    return [list(itertools.islice(parts, size)) for size in SYNTHETIC_SIZES]


def _question(rng: random.Random, pattern: str) -> tuple[list[str], list[str]]:
    """One sentence of a pattern: its words, normalised, and their tags."""
    while "(" in pattern:  # innermost groups first
        pattern = re.sub(r"\(([^()]*)\)", lambda group: _pick(rng, group[1].split("|")), pattern)
    words, tags, used = list[str](), list[str](), set[str]()
    for item in pattern.split():
        if not item.startswith("@"):
            words, tags = words + [item], tags + ["O"]
            continue
        slot = item[1:]
        phrases = [phrase for phrase in PHRASES[slot.split(".")[-1]].split("|") if phrase not in used]
        phrase = phrases[int(len(phrases) * rng.random() ** 2)]  # the first of n: probability 1/√n
        used.add(phrase)
        words += phrase.split()
        tags += ["B-" + slot] + ["I-" + slot] * (len(phrase.split()) - 1)
    return _normalised(words), tags


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    return options[int(len(options) * rng.random())]
