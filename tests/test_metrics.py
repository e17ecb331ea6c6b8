"""Metrics of sentences, against cases counted by hand; seqeval 1.2.2 gave the same F1 for these."""

import pytest
import torch

from zo_tutorial.data.atis import IGNORED, Split
from zo_tutorial.experiments.metrics import chunk_f1, chunks, joint_metrics


@pytest.mark.parametrize(
    "tags, expected",
    [
        ([], set()),
        (["O", "O"], set()),
        (["B-a", "I-a", "O", "B-a"], {("a", 0, 1), ("a", 3, 3)}),
        (["B-a", "B-a"], {("a", 0, 0), ("a", 1, 1)}),
        (["B-a", "I-b"], {("a", 0, 0), ("b", 1, 1)}),  # another kind: a chunk of its own
        (["O", "I-a", "I-a"], {("a", 1, 2)}),  # without a beginning
        (["I-a", "B-a", "I-a"], {("a", 0, 0), ("a", 1, 2)}),
    ],
)
def test_chunks(tags, expected):
    assert chunks(tags) == expected


@pytest.mark.parametrize(
    "truth, answers, expected",
    [
        ([["B-a", "I-a", "O"]], [["B-a", "I-a", "O"]], 1),
        ([["B-a", "I-a", "O"]], [["B-a", "O", "O"]], 0),  # half a chunk is none
        ([["B-a", "O", "B-b"]], [["B-a", "O", "O"]], 2 / 3),  # P = 1, R = 1/2
        ([["B-a"], ["B-b", "I-b"]], [["B-a"], ["B-b", "B-b"]], 2 / 5),  # P = 1/3, R = 1/2, over both sentences
        ([["O"]], [["O"]], 0),
    ],
)
def test_f1_counts_whole_chunks(truth, answers, expected):
    assert chunk_f1(truth, answers) == pytest.approx(expected)


def test_metrics_of_two_sentences():
    names = ("UNK", "O", "B-a", "I-a")
    slots = torch.tensor([[IGNORED, 2, 3, 1], [IGNORED, 1, 0, IGNORED]])
    part = Split(torch.tensor([[2, 5, 6, 7], [2, 5, 8, 0]]), slots, torch.tensor([1, 2]))
    intents, tags = torch.tensor([1, 1]), torch.tensor([[9, 2, 3, 1], [9, 1, 0, 9]])
    assert joint_metrics(intents, tags, part, names) == {
        "intent_accuracy": 0.5,
        "slot_f1": pytest.approx(2 / 3),  # the unknown tag is a chunk that cannot be found: P = 1, R = 1/2
        "token_accuracy": pytest.approx(0.8),  # it is never right, though the prediction has its id
        "sentence_accuracy": 0.5,
    }


@pytest.mark.parametrize("guess", [0, 1])
def test_what_training_does_not_know_is_never_right(guess):
    names = ("UNK", "O", "B-a")
    slots = torch.tensor([[IGNORED, 1, 2], [IGNORED, 1, 0], [IGNORED, 0, IGNORED]])
    part = Split(torch.ones(3, 3, dtype=torch.int64), slots, torch.tensor([0, 1, 0]))
    tags = torch.where(slots > 0, slots, guess)  # all that can be known is right
    metrics = joint_metrics(torch.where(part.intents > 0, part.intents, guess), tags, part, names)
    assert metrics == {
        "intent_accuracy": pytest.approx(1 / 3),
        "slot_f1": pytest.approx(2 / 4),  # three chunks, of which one is found
        "token_accuracy": pytest.approx(3 / 5),
        "sentence_accuracy": 0.0,  # an unknown intent, an unknown tag, both
    }


def test_an_unknown_tag_makes_no_other_sentence_wrong():
    part = Split(torch.ones(2, 2, dtype=torch.int64), torch.tensor([[IGNORED, 0], [IGNORED, 1]]), torch.tensor([1, 1]))
    metrics = joint_metrics(part.intents, part.slots.clamp_min(0), part, ("UNK", "O"))
    assert metrics == {"intent_accuracy": 1.0, "slot_f1": 0.0, "token_accuracy": 0.5, "sentence_accuracy": 0.5}
