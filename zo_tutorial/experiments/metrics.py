"""How well sentences are understood: intent accuracy, slot F1 over chunks, token and sentence accuracy (chapter 11)."""

from collections.abc import Sequence

from torch import Tensor

from zo_tutorial.data.atis import IGNORED, UNK, UNK_ID, Split


def joint_metrics(intents: Tensor, tags: Tensor, part: Split, names: Sequence[str]) -> dict[str, float]:
    """The metrics of predicted intents (N,) and tags (N, L) against those of a part of the data, as fractions.

    intent_accuracy: sentences whose intent is right.
    slot_f1: `chunk_f1` of the tags.
    token_accuracy: words whose tag is right; most are O, outside all chunks, so this flatters.
    sentence_accuracy: sentences with the right intent and no wrong tag.

    A tag or an intent that the training set does not know has id 0, UNK, in the data. No prediction of it is right, not
    0 either. In `slot_f1` such a word is a chunk that no prediction finds: a chunk where it is the truth, and O where
    it is predicted.

    Args:
        names: of the tags by id.
    """
    words = part.slots != IGNORED  # (N, L)
    right = (tags == part.slots) & words & (part.slots != UNK_ID)
    understood = (intents == part.intents) & (part.intents != UNK_ID)  # (N,)
    whole = understood & (right == words).all(1)
    truth, answers = [], []
    for here, true, predicted in zip(words, part.slots, tags, strict=True):
        truth.append(["B-" + UNK if k == UNK_ID else names[k] for k in true[here].tolist()])
        answers.append(["O" if k == UNK_ID else names[k] for k in predicted[here].tolist()])
    return {
        "intent_accuracy": understood.double().mean().item(),
        "slot_f1": chunk_f1(truth, answers),
        "token_accuracy": (right.sum() / words.sum()).item(),
        "sentence_accuracy": whole.double().mean().item(),
    }


def chunk_f1(truth: list[list[str]], answers: list[list[str]]) -> float:
    """F1 of chunks, 2 PR / (P + R): a chunk counts only whole, with its kind and both its ends. 0 if none is right.

    P is the share of the predicted chunks that are right, R the share of the true ones that are found, over all
    sentences together. The same number as `f1_score` of seqeval 1.2.2, whose source no longer builds with pip.
    """
    found = [chunks(tags) for tags in answers]
    wanted = [chunks(tags) for tags in truth]
    right = sum(len(f & w) for f, w in zip(found, wanted, strict=True))
    return 2 * right / max(1, sum(map(len, found)) + sum(map(len, wanted)))


def chunks(tags: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, last word) of the chunks of one sentence, tagged O, B-kind or I-kind.

    I- goes on with a chunk of its kind, and begins one where there is none, as in the CoNLL evaluation.
    """
    ended, start = set(), 0
    for place, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        if tag[:1] == "I" and before[2:] == tag[2:]:
            continue
        if before != "O":
            ended.add((before[2:], start, place - 1))
        start = place
    return ended
