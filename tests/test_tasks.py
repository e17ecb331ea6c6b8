"""The encoder's experiments on synthetic sentences: data, model, metrics, record, command line."""

import json
from collections import Counter

import pytest
import torch

from zo_tutorial.__main__ import main
from zo_tutorial.data import atis
from zo_tutorial.experiments import ExperimentError, load_config, load_record, run, train
from zo_tutorial.experiments.record import FIELDS, RESULTS
from zo_tutorial.experiments.tasks import Sentences
from zo_tutorial.tensor import TensorizedLinear_module

ENCODER = """
model: {name: Encoder, d_model: 16, heads: 2, d_hidden: 32, tensor_type: TensorTrainMatrix, max_rank: 2,
        factors: [[4, 4], [4, 8]]}
optimizer: {name: FO, lr: 0.01}
training: {epochs: 2, batch_size: 250, max_steps: 12}
data: {source: embedded}
"""
HEADS = {"lr": 0.01, "grad_estimator": "esti", "adam": True, "h_smooth": 0.01, "grad_sparsity": 0.0}
SPLIT = {
    "name": "split",
    "heads": {"modules": ["intent", "slots.3"], "method": HEADS | {"name": "SCD"}},
    "body": {"modules": ["blocks", "slots.0"], "method": {"name": "SGD", "lr": 0.01, "sigma": 0.01, "n_sample": 2}},
}
EVERYTHING = {
    "SGD": {"name": "SGD", "n_sample": 2},
    "batch": HEADS | {"name": "SCD", "grad_estimator": "batch", "grad_sparsity": 0.99},
    "sign": {"name": "SCD", "grad_estimator": "sign", "lr": 0.01, "grad_sparsity": 0.99},
    "split": SPLIT,
}

METHODS = ("FO", "SCD", "SCD_batch", "SCD_esti", "SGD")
SMALL = [f"ATIS/{net}/{method}" for net in ("GraSP", "TTM") for method in METHODS]
TUNING = ["ATIS/fine_tuning/SGD", "ATIS/fine_tuning/synthetic_FO"]
WINDOW = ["ATIS/window/FO", "ATIS/window/SCD_esti"]
FULL = [f"ATIS/{net}/full_{method}" for net in ("GraSP", "TTM") for method in METHODS]
PROVIDED = sorted(SMALL + TUNING + WINDOW + FULL)


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yml"
    file.write_text(ENCODER)
    return file


def task(config) -> Sentences:
    return Sentences(config, None, torch.device("cpu"))


def test_a_run_ends_in_a_record_with_a_baseline(small, tmp_path, capsys):
    out = tmp_path / "record.json"
    longer = {"optimizer.lr": 0.03, "training.epochs": 8, "training.max_steps": None}
    record = run(load_config(small, longer), out=out)
    assert load_record(out) == record and set(record) == {*FIELDS, *RESULTS["ATIS"]}
    assert record["data"] == {"source": "synthetic", "seed": 0, "train": 2000, "validation": 250, "test": 250}
    (best,) = [point for point in record["curve"] if point["epoch"] == record["best_epoch"]]
    assert record["validation"] == {key.removeprefix("val_"): v for key, v in best.items() if key.startswith("val_")}
    test, baseline = record["test"], record["baseline"]
    assert record["curve"][-1]["loss"] < 0.8 * record["curve"][0]["loss"] and baseline["slot_f1"] == 0
    assert test["intent_accuracy"] >= baseline["intent_accuracy"] > 0.3
    printed = capsys.readouterr().out
    assert "synthetic sentences" in printed and f"(majority {baseline['intent_accuracy']:.1%})" in printed


@pytest.mark.parametrize("method", EVERYTHING)
def test_every_method_trains_the_encoder(small, method):
    options = {"optimizer": EVERYTHING[method], "training.max_steps": 2, "training.batch_size": 32}
    record = run(load_config(small, options), quiet=True)
    assert record["queries"] == record["curve"][-1]["queries"] > 2


def test_split_trains_some_modules_by_coordinates_and_others_by_directions(small):
    config = load_config(small, {"optimizer": SPLIT, "training.max_steps": 1, "training.batch_size": 32})
    record = run(config, quiet=True)
    model = task(config).model(torch.Generator().manual_seed(0))
    sizes = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | TensorizedLinear_module):
            where = "heads" if name.startswith(("intent.", "slots.3")) else "body"
            sizes[where] += sum(p.numel() for p in layer.parameters())
    assert record["trained_parameters"] == sizes["heads"] + sizes["body"]
    assert record["queries"] == (1 + 2 * sizes["heads"]) + (1 + 2 * 2)


@pytest.mark.parametrize("steps", [3, 20])  # both cut off after the first epoch: its last step, or the 8th of 20
def test_a_killed_run_of_split_ends_as_one_that_was_not(small, tmp_path, steps):
    changes = {"optimizer": SPLIT, "optimizer.heads.method.grad_sparsity": 0.95, "training.max_steps": steps}
    config = load_config(small, changes | {"training.epochs": 3})
    whole = run(config, out=tmp_path / "whole.json", quiet=True)

    class Killed(Exception):
        pass

    def kill(point):
        raise Killed

    cut = tmp_path / "cut.json"
    with pytest.raises(Killed):
        run(config, out=cut, quiet=True, checkpoint_seconds=0, on_epoch=kill)
    again = run(config, out=cut, resume=True, quiet=True)
    timeless = [{key: v for key, v in point.items() if key != "seconds"} for point in whole["curve"]]
    assert timeless == [{key: v for key, v in point.items() if key != "seconds"} for point in again["curve"]]
    assert whole["test"] == again["test"]


def test_pruning_scores_on_at_most_so_many_sentences_of_each_intent(small):
    sentences = task(load_config(small))
    _, (intents, slots) = sentences.sample(3, torch.Generator().manual_seed(0))
    counts = Counter(intents.tolist())
    assert max(counts.values()) == 3 and set(counts) == set(sentences.train.intents.tolist())
    assert len(slots) == len(intents)
    dense = {"model.tensor_type": None, "pruning.target_ratio": 0.9, "training.max_steps": 1}
    record = run(load_config(small, dense), quiet=True)
    assert record["trained_parameters"] < 0.2 * record["parameters"]


@pytest.mark.parametrize("method", ["grasp", "snip"])
def test_pruning_draws_dropout_from_the_seed_of_the_run(small, method):
    def masks(seed, elsewhere, dropout=0.3):
        changes = {"model.dropout": dropout, "training.seed": seed}
        config = load_config(small, changes | {"pruning": {"method": method, "target_ratio": 0.5}})
        one, model = task(config), task(config).model(torch.Generator().manual_seed(5))
        torch.manual_seed(elsewhere)
        state = torch.get_rng_state()
        found = train._prune(config, model, one)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([mask.flatten() for mask in found.values()])

    first = masks(1, 10)
    assert torch.equal(first, masks(1, 11)) and not torch.equal(first, masks(2, 10))
    assert not torch.equal(first, masks(1, 10, dropout=0.0))


def test_a_batch_is_as_long_as_its_longest_sentence(small):
    sentences = task(load_config(small))
    lengths = (sentences.train.tokens != 0).sum(1)
    short = lengths.argsort()[:5]
    tokens, (_, slots) = sentences.batch(sentences.train, short)
    assert tokens.shape == slots.shape == (5, lengths[short].max())
    assert (sentences.train.slots[short, tokens.shape[1] :] == atis.IGNORED).all()


def test_an_epoch_is_batches_of_like_lengths_and_of_every_sentence_once(small):
    sentences = task(load_config(small))
    batches = sentences.batches(32, torch.Generator().manual_seed(0))
    assert torch.cat(batches).sort().values.tolist() == list(range(2000))
    lengths = (sentences.train.tokens != 0).sum(1)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert padded < 1.15 * lengths.sum()
    order = [lengths[batch].double().mean().item() for batch in batches]
    assert order != sorted(order)
    again = sentences.batches(32, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, batches, again))


def test_embedding_in_ttm(small):
    options = {"model.word_factors": [27, 27], "model.embedding_rank": 5}
    models = [task(load_config(small, changes)).model(torch.Generator()) for changes in ({}, options)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    words = len(task(load_config(small)).data.words)
    assert sizes[0] - sizes[1] == words * 16 - 2 * 27 * 4 * 5
    assert run(load_config(small, options | {"training.max_steps": 1}), quiet=True)["queries"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.factors": [[4, 4]]}, "model: factors: none of [[4, 4]] multiply to the width 32"),
        ({"model.word_factors": [9, 9, 9]}, "none of [[4, 4], [4, 8]] multiply to the width 16 by 3 factors"),
        ({"model.heads": 3}, "model: d_model = 16 is no multiple of heads = 3"),
        ({"model.word_factors": [2, 3]}, "model: the factors [2, 3] and [4, 4] do not make a table"),
        ({"model.focus": [[0, 1.0]]}, "model: focus has 1 pairs of offset and slope for 2 heads"),
        ({"optimizer": SPLIT | {"body": {}}}, "optimizer.body.modules: is missing"),
        ({"optimizer": SPLIT, "optimizer.body.method.lr": -1.0}, "optimizer.body.method.lr: should be greater than"),
        ({"optimizer": SPLIT, "optimizer.body.modules": ["feet"]}, "body: modules: the model has no 'feet'; it has"),
        ({"optimizer": SPLIT, "optimizer.body.modules": ["intent.2"]}, "both train intent.2.bias, intent.2.weight"),
    ],
)
def test_a_bad_config_is_one_line(small, changes, message):
    with pytest.raises(ExperimentError) as raised:
        run(load_config(small, changes), quiet=True)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_line(small, capsys):
    assert main(["encoder", "--list"]) == 0 and capsys.readouterr().out == "".join(f"{name}.yml\n" for name in PROVIDED)
    assert main(["encoder", "-config", str(small), "--quick", "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data: synthetic sentences") and json.loads(lines[-1])["name"] == "small"
    assert main(["mnist", "-config", str(small)]) == 2
    assert "trains a Encoder; the command for it is encoder" in capsys.readouterr().err


def test_run_tensors_runs_the_provided_experiments_in_turn_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run_tensors", "--list", "--seed", "3"]) == 0
    listed = [*SMALL, *WINDOW]  # the full-size ones by name only
    assert capsys.readouterr().out == "".join(f"{name}, seed 3\n" for name in listed)
    assert main(["run_tensors", "configs/ATIS/TTM/FO.yml", "--quick", "--jobs", "1"]) == 0
    (file,) = (tmp_path / "reproduced/run_tensors_quick").iterdir()
    record = load_record(file)
    assert file.name == "ATIS_TTM_FO_s0.json" and record["data"]["source"] == "synthetic"
    assert "intent %" in capsys.readouterr().out
    assert main(["run_tensors", "ATIS/TTM/FO", "--quick", "--jobs", "1"]) == 0 and load_record(file) == record
    assert main(["run_tensors", "ATIS/TTM/nothing"]) == 2
    assert "ATIS/TTM/nothing: is no encoder experiment of the package" in capsys.readouterr().err


@pytest.mark.parametrize("net, weights, trained", [("GraSP", 16_064_399, 892_099), ("TTM", 397_111, 303_343)])
def test_the_full_size_trains_a_step(net, weights, trained):
    """On ATIS, with 725 words, 47 places, 22 intents and 121 tags; here the size follows the synthetic sentences."""
    record = run(load_config(f"ATIS/{net}/full_FO", {"data.source": "embedded", "training.max_steps": 1}), quiet=True)
    assert record["queries"] == 1 and weights > record["parameters"] > 0.7 * weights
    assert trained > record["trained_parameters"] > 0.7 * trained


def test_coordinates_learn_more_than_the_majority_in_a_quick_run():
    record = run(load_config("ATIS/TTM/SCD_esti", quick=True), quiet=True)
    test, majority = record["test"], record["baseline"]
    assert test["intent_accuracy"] > majority["intent_accuracy"] + 0.1
    assert test["token_accuracy"] > majority["token_accuracy"] + 0.15 and test["slot_f1"] > 0.5
