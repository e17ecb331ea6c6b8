"""Configs, the training loop, checkpoints and records."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from pydantic import BaseModel

from zo_tutorial.data import DataError, mnist
from zo_tutorial.experiments import Config, ExperimentError, load_config, load_record, run
from zo_tutorial.experiments.checkpoint import load_checkpoint, load_weights, save_checkpoint
from zo_tutorial.experiments.config import names, parse_overrides
from zo_tutorial.experiments.first_order import FirstOrder
from zo_tutorial.experiments.phases import generator_of
from zo_tutorial.experiments.record import FIELDS, RESULTS
from zo_tutorial.experiments.tasks import Digits
from zo_tutorial.experiments.train import _measure
from zo_tutorial.models import MNIST_FC
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask

SHIPPED = {
    f"MNIST/{name}"
    for name in [f"{net}/{run}" for net in ("FC", "TTM") for run in "FO SGD SCD SCD_batch SCD_esti STP mix".split()]
    + "TT/FO TT/SGD TT/SCD TT/SCD_esti TTM/GraSP/FO TTM/GraSP/SCD TTM/GraSP/SCD_esti CNN/FO CNN/SCD_esti".split()
    + "CNN/few_SCD_esti wide_CNN/FO wide_CNN/SCD_esti pooled/FO pooled/SGD".split()
    + "TTM/rank6_FO TTM/rank6_SCD_esti TTM/tonn_SCD_esti".split()
}
# A net of 4 hidden units of whose 3,176 weights 96 are left; 4 steps an epoch.
SMALL = """
model: {name: MNIST_FC, hidden: 4}
pruning: {target_ratio: 0.97, per_class: 5}
optimizer: {name: FO, lr: 0.05}
training: {epochs: 2, batch_size: 1000}
data: {source: embedded}
"""
ESTI = {"name": "SCD", "grad_estimator": "esti", "lr": 0.02, "h_smooth": 0.01, "adam": True}
METHODS = {
    "FO": {"name": "FO", "lr": 0.05},
    "SGD": {"name": "SGD", "lr": 0.01, "sigma": 0.01},
    "sign": {"name": "SCD", "grad_estimator": "sign", "lr": 0.01},
    "esti": ESTI,
    "mix": {
        "name": "mix",
        "switch_epoch": 2,
        "SGD": {"lr": 0.01, "sigma": 0.01},
        "SCD": {key: value for key, value in ESTI.items() if key != "name"},
    },
}


@pytest.fixture
def small(tmp_path):
    """The path of the small config."""
    path = tmp_path / "small.yml"
    path.write_text(SMALL)
    return path


def without_seconds(curve):
    return [{key: value for key, value in point.items() if key != "seconds"} for point in curve]


# --- configs ---------------------------------------------------------------------------------------------------------


def test_all_configs_are_there_and_valid():
    assert {name for name in names() if name.startswith("MNIST/")} == SHIPPED
    for name in SHIPPED:
        config = load_config(name)
        assert config.name == name == load_config(f"configs/{name}.yml").name
        assert load_config(name, quick=True).data.source == "embedded"


def test_configs_are_what_their_names_say():
    for net in ("FC", "TTM"):
        optimizers = [load_config(f"MNIST/{net}/{name}").optimizer for name in ("SCD", "STP", "SCD_batch", "SCD_esti")]
        assert [(optimizer.grad_estimator, optimizer.STP) for optimizer in optimizers] == [
            ("sign", False),
            ("sign", True),
            ("batch", True),
            ("esti", True),
        ]
        assert load_config(f"MNIST/{net}/mix").optimizer.name == "mix"
    for name in SHIPPED:  # the first-order run trains the same net, under the same masks
        config = load_config(name)
        ceiling = load_config(name.rpartition("/")[0] + ("/rank6_FO" if "rank6" in name else "/FO"))
        if "tonn" not in name:
            assert config.model == ceiling.model and config.pruning == ceiling.pruning
        if "/FC/" in name:
            assert config.pruning.method == "grasp" and config.pruning.target_ratio == 0.95


def test_only_training_images_are_moved(small):
    """By up to training.shift pixels, otherwise in each epoch, and the same again in a run that begins anew."""
    task, still = (Digits(load_config(small, {"training.shift": s}), None, torch.device("cpu")) for s in (3, 0))
    index = torch.arange(40)
    seen = [task.batch(task.train, index, generator_of(task.config, f"shift {step}"))[0] for step in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(task.batch(task.train, index)[0], task.train.images[index])
    assert torch.equal(still.batch(still.train, index, torch.Generator())[0], task.train.images[index])
    first, again, unmoved = (run(load_config(small, {"training.shift": s}), quiet=True) for s in (3, 3, 0))
    assert without_seconds(first["curve"]) == without_seconds(again["curve"]) != without_seconds(unmoved["curve"])
    assert "shift" not in load_config(small).model_dump()["training"]  # so older records keep their hash


def test_sentences_are_not_moved():
    with pytest.raises(ExperimentError, match=r"training\.shift: sentences cannot be moved"):
        run(load_config("ATIS/TTM/FO", {"training.shift": 1}, quick=True), quiet=True)


def test_every_key_is_described():
    def groups(model):
        yield model
        for field in model.model_fields.values():
            for part in getattr(field.annotation, "__args__", [field.annotation]):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from groups(part)

    seen = set(groups(Config))
    assert len(seen) == 20
    for group in seen:
        for name, field in group.model_fields.items():
            is_group = any(isinstance(part, type) and issubclass(part, BaseModel) for part in [field.annotation])
            assert field.description or name == "name" or is_group or "|" in str(field.annotation), (group, name)
    assert Config.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lr: 0.05", "lrr: 0.05", "optimizer.lrr: unknown key; allowed: name, lr, momentum, weight_decay"),
        ("lr: 0.05", "lr: fast", "optimizer.lr: should be a valid number, not 'fast'"),
        ("lr: 0.05", "lr: true", "optimizer.lr: should be a valid number, not True"),
        ("lr: 0.05", "lr: -1", "optimizer.lr: should be greater than or equal to 0, not -1"),
        ("lr: 0.05", "lr: .inf", "optimizer.lr: should be a finite number, not inf"),
        ("lr: 0.05", "lr: 0.05, adam: 1", "optimizer.adam: should be a valid boolean, not 1"),
        ("name: FO", "name: Adam", "should be one of 'FO', 'forward_mode', 'SGD', 'SCD', 'mix', 'split', not 'Adam'"),
        ("name: FO, ", "", "optimizer.name: is missing"),
        ("target_ratio: 0.97", "target_ratio: 1.5", "pruning.target_ratio: should be less than 1, not 1.5"),
        ("target_ratio: 0.97, ", "", "pruning.target_ratio: is missing"),
        ("epochs: 2", "epochs: 0", "training.epochs: should be greater than or equal to 1, not 0"),
        ("epochs: 2", "epochs: 2.5", "training.epochs: should be a valid integer, not 2.5"),
        ("epochs: 2", "epochs: '2'", "training.epochs: should be a valid integer, not '2'"),
        ("source: embedded", "source: cifar", "data.source: should be 'auto', 'full' or 'embedded', not 'cifar'"),
        ("hidden: 4", "hidden: 4, max_rank: 3", "model.max_rank: unknown key; allowed: name, hidden"),
        ("name: MNIST_FC", "name: MNIST_RNN", "model.name: should be one of 'MNIST_FC', 'MNIST_TTM', 'MNIST_TT'"),
        ("lr: 0.05", "opt_layers_strs: nn.Lin", "optimizer.opt_layers_strs.0: should be 'nn.Linear', 'nn.Conv2d'"),
        ("training: {epochs: 2, batch_size: 1000}", "", "training: is missing"),
        ("training: {epochs: 2, batch_size: 1000}", "training: 3", "training: should be a group of keys: epochs"),
        ("data:", "dataset:", "dataset: unknown key; allowed: model, pruning, optimizer, scheduler, training, data"),
        ("data:", "scheduler: {name: step}\ndata:", "scheduler.step_size: is missing"),
        ("data:", "model: {name: MNIST_FC}\ndata:", "cannot be read as YAML: model is given twice"),
        ("data: {", "data: {{", "cannot be read as YAML"),
        ("FO, lr: 0.05", "mix, SGD: {}, SCD: {lr: -1}, switch_epoch: 2", "optimizer.SCD.lr: should be greater than or"),
        ("FO, lr: 0.05", "mix, SGD: {n_sample: 0}, SCD: {}, switch_epoch: 2", "optimizer.SGD.n_sample: should be"),
        ("FO, lr: 0.05", "mix, SGD: {}, switch_epoch: 2", "optimizer.SCD: is missing"),
        ("FO, lr: 0.05", "SCD, grad_estimator: best", "optimizer.grad_estimator: should be 'sign', 'batch' or 'esti'"),
        ("FO, lr: 0.05", "SCD, grad_sparsity: 1.1", "optimizer.grad_sparsity: should be less than or equal to 1"),
        ("FO, lr: 0.05", "SCD, grad_sparsity: all", "optimizer.grad_sparsity: should be a valid number, not 'all'"),
        ("FO, lr: 0.05", "SCD, grad_sparsity: {fc1: 2}", "optimizer.grad_sparsity.fc1: should be less than or equal"),
        ("FO, lr: 0.05", "SCD, grad_sparsity: {}", "optimizer.grad_sparsity: Dictionary should have at least 1 item"),
        ("FO, lr: 0.05", "SGD, directions: up", "optimizer.directions: should be 'gaussian', 'rademacher'"),
    ],
)
def test_a_bad_config_is_one_line_that_names_file_and_key(small, old, new, expected):
    assert old in SMALL
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(ExperimentError) as caught:
        load_config(small)
    message = str(caught.value)
    assert message.startswith(f"{small}: ") and expected in message and "\n" not in message


@pytest.mark.parametrize("content", ["", "just words", "- 1", b"\xff\xfe\x00", "a: !!python/object:os.system {}"])
def test_a_file_that_is_no_config(small, content):
    small.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExperimentError, match=r"small\.yml: (should hold the groups|cannot be read as YAML)"):
        load_config(small)


def test_overrides(small):
    assignments = ["optimizer.lr=1e-3", "training.max_steps=7", "pruning=null", "optimizer.adam=no"]
    config = load_config(small, parse_overrides(assignments))
    assert config.optimizer.lr == 0.001 and config.optimizer.adam is False
    assert config.training.max_steps == 7 and config.pruning is None
    assert load_config(small, {"scheduler.name": "cosine"}).scheduler.name == "cosine"  # makes the group
    with pytest.raises(ExperimentError, match=r"small\.yml: optimizer\.lrr: unknown key"):
        load_config(small, {"optimizer.lrr": 1})
    with pytest.raises(ExperimentError, match=r"optimizer\.lr\.x: unknown key; lr is a value"):
        load_config(small, {"optimizer.lr.x": 1})
    for assignment in ("optimizer.lr", "=3", "optimizer.lr=[1"):
        with pytest.raises(ExperimentError, match="--set"):
            parse_overrides([assignment])


def test_overrides_win_over_quick():
    quick = load_config("MNIST/FC/mix", quick=True)
    assert (quick.training.epochs, quick.training.max_steps, quick.optimizer.switch_epoch) == (2, 64, 2)
    assert load_config("MNIST/FC/SCD", quick=True).optimizer.grad_sparsity == 0.75
    chosen = {"training.max_steps": 3, "data.source": "full", "optimizer.SCD.grad_sparsity": 0.5}
    config = load_config("MNIST/FC/mix", chosen, quick=True)
    assert {key: config.flat()[key] for key in chosen} == chosen and config.training.epochs == 2


@pytest.mark.parametrize("shares, cut", [({"fc1": 0.9, "fc2": 0.2}, {"fc1": 0.9, "fc2": 0.75}), (0.9, 0.9), (0, 0.75)])
def test_quick_skips_at_least_so_many_coordinates_of_each_module(tmp_path, shares, cut):
    path = tmp_path / "sign.yml"
    path.write_text(f"{SMALL.replace('FO, lr: 0.05', f'SCD, grad_sparsity: {json.dumps(shares)}')}")
    assert load_config(path).optimizer.grad_sparsity == shares
    assert load_config(path, quick=True).optimizer.grad_sparsity == cut


def test_shares_by_module_reach_the_optimiser(small):
    steps = {"training.max_steps": 1, "pruning": None}
    record = run(
        load_config(small, {"optimizer": ESTI | {"grad_sparsity": {"fc1": 1.0, "fc2": 0.0}}} | steps), quiet=True
    )
    assert record["queries"] == 1 + 2 * 4 * 10  # those of the last layer alone


def test_name_and_hash(small, tmp_path):
    assert load_config(small).name == "small"
    below = tmp_path / "configs" / "mine" / "run.yml"
    below.parent.mkdir(parents=True)
    below.write_text(SMALL)
    assert load_config(below).name == "mine/run"
    assert load_config(below).hash() == load_config(small).hash()  # of what is run, not of where it is written
    for other in ({"optimizer.lr": 0.051}, {"pruning.modules": ["fc1"]}):
        assert load_config(small, other).hash() != load_config(small).hash()
    assert load_config(small, {"pruning.modules": None, "model.pool": 1}).hash() == load_config(small).hash()
    assert "pool" not in load_config(small).model_dump()["model"]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_config_runs_in_quick_form(name, tmp_path):
    out = tmp_path / "record.json"
    # chapter 10 runs them all to the end
    few = {"training.max_steps": 4} if load_config(name).optimizer.name in ("SGD", "SCD") else {}
    config = load_config(name, few, quick=True)
    record = run(config, out=out, quiet=True)
    assert record == load_record(out) and set(record) == {*FIELDS, *RESULTS["MNIST"]}
    assert record["name"] == name and record["data"]["source"] == "embedded"
    assert record["config"] == json.loads(json.dumps(config.model_dump())) and record["config_hash"] == config.hash()
    assert record["queries"] == record["curve"][-1]["queries"] > 0
    assert 0 <= record["test_accuracy"] <= 1
    if config.optimizer.name == "FO":  # two epochs, of 32 batches, are enough to be well above chance
        assert record["queries"] == 64 and record["test_accuracy"] > 0.3
    parameters = {"FC": 203_264, "TTM": 1_504, "TT": 10_685, "CNN": 4_278, "wide_CNN": 16_586, "pooled": 18_540}
    assert record["parameters"] == (3_962 if "rank6" in name else parameters[name.split("/")[1]])
    trained = {"FC": 10_164, "GraSP": 752}
    assert record["trained_parameters"] == next((n for k, n in trained.items() if k in name), record["parameters"])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_and_follows_its_seed(small, method):
    overrides = {"optimizer": METHODS[method]}
    first, again = (run(load_config(small, overrides), quiet=True) for _ in range(2))
    other = run(load_config(small, overrides | {"training.seed": 1}), quiet=True)
    assert without_seconds(first["curve"]) == without_seconds(again["curve"])
    assert first["test_accuracy"] == again["test_accuracy"]
    assert [p["loss"] for p in first["curve"]] != [p["loss"] for p in other["curve"]]
    assert first["data"] == other["data"]  # the split has a seed of its own


def test_the_global_generator_is_left_alone(small):
    state = torch.get_rng_state()
    run(load_config(small), quiet=True)
    run(load_config(small, {"optimizer": METHODS["SGD"], "training.max_steps": 1}), quiet=True)
    assert torch.equal(state, torch.get_rng_state())


def test_queries_in_the_record(small):
    trained = 96  # of 4 · 794 weights int(0.97 · 3176) = 3080 are removed
    expected = {"FO": 1, "SGD": 41, "esti": None, "mix": None}
    for method, queries in expected.items():
        overrides = {"optimizer": METHODS[method]}
        if method != "FO" and method != "SGD":
            overrides["optimizer"] = json.loads(json.dumps(METHODS[method]))
            (overrides["optimizer"]["SCD"] if method == "mix" else overrides["optimizer"])["grad_sparsity"] = 0.0
        record = run(load_config(small, overrides), quiet=True)
        assert record["trained_parameters"] == trained
        per_epoch = [point["queries"] for point in record["curve"]]
        coordinates = 1 + 2 * trained
        steps = {"esti": (coordinates, coordinates), "mix": (41, coordinates)}.get(method, (queries, queries))
        assert per_epoch == [4 * steps[0], 4 * steps[0] + 4 * steps[1]]


def accuracy(model, part) -> float:
    return _measure(Digits, model, part)["accuracy"]


def test_the_best_epoch_is_chosen_on_validation_and_tested(small, tmp_path):
    out = tmp_path / "record.json"
    overfit = {"optimizer.lr": 0.03, "model.hidden": 8, "pruning": None, "training.batch_size": 100}
    config = load_config(small, overfit | {"training.epochs": 6})
    record = run(config, out=out, quiet=True)
    assert [point["epoch"] for point in record["curve"]] == [1 / 40, 2 / 40, 5 / 40, 10 / 40, 20 / 40, 1, 2, 3, 4, 5, 6]
    accuracies = [point["val_accuracy"] for point in record["curve"][5:]]
    assert record["val_accuracy"] == max(accuracies) != accuracies[-1]
    assert record["best_epoch"] == 1 + accuracies.index(max(accuracies))
    best = torch.load(tmp_path / "record.ckpt", weights_only=True)["progress"]["best"]["model"]
    model = MNIST_FC(8)
    model.load_state_dict(best)
    data = mnist.load("embedded")
    assert accuracy(model, data.validation) == record["val_accuracy"]
    assert accuracy(model, data.test) == record["test_accuracy"]


def test_accuracy_is_the_fraction_right():
    data = mnist.load("embedded").validation
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(784, 10))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.nn.functional.one_hot(torch.tensor(3), 10).float()  # says 3, always
    assert accuracy(model, data) == 0.1
    assert model[0].training  # as it was
    wide = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(784, 10))
    assert accuracy(wide, data) == accuracy(wide, data)  # no dropout


@pytest.mark.parametrize("method", METHODS)
def test_removed_and_unchosen_weights_never_move(small, tmp_path, method):
    optimizer = json.loads(json.dumps(METHODS[method]))
    for group in [optimizer[name] for name in ("SGD", "SCD")] if method == "mix" else [optimizer]:
        if group.get("grad_estimator") != "sign" and group.get("sigma") is None:
            group["weight_decay"] = 0.1
    run(load_config(small, {"optimizer": optimizer}), out=tmp_path / "record.json", quiet=True)
    state = torch.load(tmp_path / "record.ckpt", weights_only=True)
    assert sum(int(mask.sum()) for mask in state["masks"].values()) == 96
    for name, mask in state["masks"].items():
        assert (state["model"][name][~mask] == 0).all() and (state["model"][name][mask] != 0).any()


def test_first_order_trains_the_chosen_layers_only(tmp_path):
    overrides = {"optimizer.opt_layers_strs": "nn.Conv2d", "optimizer.momentum": 0.9, "optimizer.adam": False}
    config = load_config("MNIST/CNN/FO", overrides | {"training.max_steps": 3}, quick=True)
    record = run(config, out=tmp_path / "a.json", quiet=True)
    still = run(load_config("MNIST/CNN/FO", overrides | {"training.max_steps": 3, "optimizer.lr": 0.0}, quick=True),
                out=tmp_path / "b.json", quiet=True)  # fmt: skip
    trained, start = (torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["model"] for file in "ab")
    assert torch.equal(trained["fc.weight"], start["fc.weight"])
    assert not torch.equal(trained["conv1.weight"], start["conv1.weight"])
    assert record["trained_parameters"] == still["trained_parameters"] == record["parameters"] - 1_450


def test_first_order_steps_are_those_of_torch(small, tmp_path):
    """No pruning: the loop ends with the weights of a hand-written one on the same batches."""
    from zo_tutorial.experiments.phases import generator_of

    config = load_config(small, {"pruning": None, "training.epochs": 1, "optimizer.weight_decay": 0.01})
    run(config, out=tmp_path / "record.json", quiet=True)
    train = mnist.load("embedded").train
    model = MNIST_FC(4, generator=generator_of(config, "weights"))
    adam = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.01)
    for batch in torch.randperm(4000, generator=generator_of(config, "shuffle 1")).split(1000):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(train.images[batch]), train.labels[batch]).backward()
        adam.step()
    for name, value in torch.load(tmp_path / "record.ckpt", weights_only=True)["model"].items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        (None, [0.05, 0.05]),
        ({"name": "cosine", "eta_min": 0.01}, [0.03, 0.01]),
        ({"name": "step", "step_size": 1, "gamma": 0.5}, [0.025, 0.0125]),
        ({"name": "exponential", "gamma": 0.5}, [0.025, 0.0125]),
    ],
)
def test_schedulers_by_the_epoch(small, tmp_path, scheduler, rates):
    for steps, rate in zip((4, 8), rates, strict=True):
        if scheduler and scheduler["name"] == "cosine" and steps == 4:
            continue  # it ends where the run ends, so its half way is not seen at the end of a run
        out = tmp_path / f"{steps}.json"
        run(load_config(small, {"scheduler": scheduler, "training.max_steps": steps}), out=out, quiet=True)
        state = torch.load(out.with_suffix(".ckpt"), weights_only=True)
        assert state["phases"][0]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)


def test_mix_has_a_schedule_for_each(small, tmp_path):
    overrides = {"optimizer": METHODS["mix"], "scheduler": {"name": "cosine"}}
    run(load_config(small, overrides), out=tmp_path / "record.json", quiet=True)
    for phase in torch.load(tmp_path / "record.ckpt", weights_only=True)["phases"]:
        assert phase["scheduler"]["T_max"] == 4
        assert phase["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)


def test_steps_and_batches(small):
    record = run(load_config(small, {"training.max_steps": 6}), quiet=True)
    assert [(point["epoch"], point["queries"]) for point in record["curve"]] == [(1, 4), (2, 6)]
    record = run(load_config(small, {"training.batch_size": 1500}), quiet=True)
    assert [point["queries"] for point in record["curve"]] == [3, 6]  # 1500 + 1500 + 1000
    record = run(load_config(small, {"training.batch_size": 5000}), quiet=True)
    assert [point["queries"] for point in record["curve"]] == [1, 2]


@pytest.mark.parametrize("method", ["grasp", "snip", "magnitude", "random"])
def test_pruning_methods(small, tmp_path, method):
    masks = {}
    for shuffle in (False, True):
        out = tmp_path / f"{shuffle}.json"
        overrides = {"pruning.method": method, "pruning.shuffle": shuffle, "training.max_steps": 1}
        assert run(load_config(small, overrides), out=out, quiet=True)["trained_parameters"] == 96
        masks[shuffle] = torch.load(out.with_suffix(".ckpt"), weights_only=True)["masks"]
    for name, mask in masks[False].items():
        assert mask.sum() == masks[True][name].sum() and not torch.equal(mask, masks[True][name])


def test_the_record_says_nothing_of_the_place(small, tmp_path):
    record = run(load_config(small, {"training.max_steps": 1}), quiet=True)
    text = json.dumps(record)
    for secret in (socket.gethostname(), str(tmp_path), os.getcwd(), os.path.expanduser("~")):
        assert len(secret) < 3 or secret not in text
    assert "threads" in record["machine"]
    assert torch.__version__.startswith(record["versions"]["torch"].partition("+")[0])


def test_a_diverging_run_is_an_error(small):
    with pytest.raises(FloatingPointError, match="at step"):
        run(load_config(small, {"optimizer.lr": 1e30, "optimizer.adam": False}), quiet=True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"optimizer.momentum": 0.9}, "optimizer: adam has moments of its own"),
        ({"optimizer": {"name": "SCD", "grad_estimator": "sign", "adam": True}}, "optimizer: grad_estimator 'sign'"),
        ({"optimizer.opt_layers_strs": ["nn.Conv2d"]}, "optimizer: opt_layers_strs: the model has no layer of"),
        ({"pruning.modules": ["depths"]}, "pruning: modules: the model has no 'depths'; it has "),
        ({"pruning.per_class": 401}, "pruning: 401 examples of each class asked for"),
        ({"model": {"name": "MNIST_TTM", "in_factors": [3, 7, 7, 4]}}, "model: the in factors [3, 7, 7, 4] do not"),
        ({"model": {"name": "MNIST_FC", "hidden": 1}, "pruning.target_ratio": 0.9999}, None),  # one weight is left
    ],
)
def test_values_that_do_not_go_together(small, tmp_path, overrides, expected):
    out = tmp_path / "record.json"
    if expected is None:
        assert run(load_config(small, overrides), quiet=True)["trained_parameters"] == 1
        return
    with pytest.raises(ExperimentError) as caught:
        run(load_config(small, overrides), out=out, quiet=True)
    assert f"{small}: {expected}" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("record*"))


def test_an_unknown_device(small):
    with pytest.raises(ExperimentError, match="device 'gpu7' cannot be used"):
        run(load_config(small), device="gpu7", quiet=True)


def test_data_errors_pass_through(small, tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    with pytest.raises(DataError, match="train-images-idx3-ubyte is missing"):
        run(load_config(small, {"data.source": "auto"}), root=tmp_path, out=tmp_path / "record.json", quiet=True)
    assert not list(tmp_path.glob("record*"))


# --- checkpoints and records -----------------------------------------------------------------------------------------


def assert_same_end(first, second):
    """Both runs, FILE.json and FILE.ckpt, ended with the same weights, bit for bit, and the same record."""
    one, two = (torch.load(path.with_suffix(".ckpt"), weights_only=True) for path in (first, second))
    for weights in ("model", "masks"):
        assert one[weights].keys() == two[weights].keys()
        assert all(torch.equal(value, two[weights][name]) for name, value in one[weights].items())
    best, other = one["progress"]["best"], two["progress"]["best"]
    assert all(torch.equal(value, other["model"][name]) for name, value in best["model"].items())
    one, two = load_record(first), load_record(second)
    assert without_seconds(one.pop("curve")) == without_seconds(two.pop("curve"))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}


def test_a_killed_run_resumes_and_ends_with_the_same_weights(small, tmp_path):
    """A real process is killed in the middle of an epoch, twice: in the first epoch (SGD) and in the second (SCD)."""
    overrides = {"optimizer": METHODS["mix"], "scheduler": {"name": "cosine"}, "training.batch_size": 100}
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    run(load_config(small, overrides), out=whole, quiet=True)
    code = f"""if True:
        import torch
        torch.set_num_threads(1)
        from zo_tutorial.experiments import load_config, run
        run(load_config({str(small)!r}, {overrides!r}), out={str(killed)!r}, resume=True, checkpoint_seconds=0)
    """
    checkpoint = killed.with_suffix(".ckpt")
    for start, end in ((1, 39), (41, 79)):  # steps; 40 make an epoch
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not checkpoint.exists() or torch.load(checkpoint, weights_only=True)["progress"]["step"] < start:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and not killed.exists()
        assert start <= torch.load(checkpoint, weights_only=True)["progress"]["step"] <= end
    run(load_config(small, overrides), out=killed, resume=True, quiet=True)
    assert_same_end(whole, killed)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_interrupted_again_and_again_ends_with_the_same_weights(small, tmp_path, method, monkeypatch):
    """Interrupted before a step, in the middle of an epoch, and in the middle of writing a checkpoint."""
    config = load_config(small, {"optimizer": METHODS[method], "training.batch_size": 400})
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    run(config, out=whole, quiet=True)
    calls = {"step": 0, "save": 0}

    def interrupted(function, kind, at):
        def call(*arguments):
            calls[kind] += 1
            if calls[kind] in at:
                if kind == "save":
                    arguments[1].write(b"half a checkpoint")
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    for optimizer in (FirstOrder, ZO_SGD_mask, ZO_SCD_mask):
        monkeypatch.setattr(optimizer, "step", interrupted(optimizer.step, "step", (1, 4)))
    monkeypatch.setattr(torch, "save", interrupted(torch.save, "save", (5,)))
    interruptions = 0
    while not stopped.exists():
        try:
            run(config, out=stopped, resume=True, quiet=True, checkpoint_seconds=0)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 3
    assert_same_end(whole, stopped)


def test_an_interrupted_save_reports_the_interruption_and_leaves_no_checkpoint(tmp_path):
    """In the middle of writing, whatever torch's writer makes of its half-written file."""

    class Interrupting:
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "record.ckpt", {"weights": torch.zeros(10_000), "state": Interrupting()})
    assert not (tmp_path / "record.ckpt").exists()


def test_nothing_is_overwritten_without_resume(small, tmp_path):
    config, out = load_config(small), tmp_path / "record.json"
    record = run(config, out=out, quiet=True)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("record*")}
    assert sorted(written) == ["record.ckpt", "record.json"]
    with pytest.raises(ExperimentError, match=r"record\.json: exists already"):
        run(config, out=out, quiet=True)
    assert run(config, out=out, resume=True, quiet=True) == record  # finished: nothing left to do
    with pytest.raises(ExperimentError, match=r"record\.json: is the record of another run"):
        run(load_config(small, {"optimizer.lr": 0.01}), out=out, resume=True, quiet=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("record*")} == written
    out.unlink()
    with pytest.raises(ExperimentError, match=r"record\.ckpt: exists already"):
        run(config, out=out, quiet=True)
    assert (tmp_path / "record.ckpt").read_bytes() == written["record.ckpt"]


def test_a_checkpoint_of_another_run_is_refused(small, tmp_path):
    out = tmp_path / "record.json"
    run(load_config(small), out=out, quiet=True)
    out.unlink()
    written = (tmp_path / "record.ckpt").read_bytes()
    with pytest.raises(ExperimentError, match=r"record\.ckpt: .*: optimizer\.lr is 0\.05 there and 0\.06 here"):
        run(load_config(small, {"optimizer.lr": 0.06}), out=out, resume=True, quiet=True)
    with pytest.raises(ExperimentError, match=r"record\.ckpt: .*optimizer\.n_sample is None there and 20 here|name is"):
        run(load_config(small, {"optimizer": METHODS["SGD"]}), out=out, resume=True, quiet=True)
    assert (tmp_path / "record.ckpt").read_bytes() == written and not out.exists()


def test_a_damaged_checkpoint_is_refused(small, tmp_path):
    out, checkpoint = tmp_path / "record.json", tmp_path / "record.ckpt"
    run(load_config(small), out=out, quiet=True)
    out.unlink()
    whole = checkpoint.read_bytes()
    weight = torch.load(checkpoint, weights_only=True)["model"]["fc1.weight"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(weight) + 100] ^= 1  # one bit of one weight
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"no checkpoint", bytes(flipped)):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=r"record\.ckpt: damaged, or no checkpoint: .") as caught:
            run(load_config(small), out=out, resume=True, quiet=True)
        assert "\n" not in str(caught.value)
        assert checkpoint.read_bytes() == damaged and not out.exists()
    torch.save({"weights": torch.ones(3)}, checkpoint)
    with pytest.raises(ExperimentError, match=r"record\.ckpt: damaged, or no checkpoint"):
        run(load_config(small), out=out, resume=True, quiet=True)


@pytest.fixture
def trained(small, tmp_path):
    """The checkpoint of a run, and the weights of its best epoch."""
    run(load_config(small), out=tmp_path / "first.json", quiet=True)
    path = tmp_path / "first.ckpt"
    return path, torch.load(path, weights_only=True)["progress"]["best"]["model"]


@pytest.mark.parametrize("method", ["FO", "SGD", "esti"])
def test_a_run_starts_from_the_weights_of_another(small, trained, tmp_path, method):
    """With lr 0 they stay; the record says where from, and a killed run goes on from there."""
    first, weights = trained
    stay = load_config(small, {"optimizer": METHODS[method] | {"lr": 0.0}, "pruning": None, "training.seed": 3})
    record = run(stay, out=tmp_path / "second.json", init=first, quiet=True)
    state = torch.load(tmp_path / "second.ckpt", weights_only=True)
    assert all(torch.equal(value, state["model"][name]) for name, value in weights.items())
    assert record["init"] == load_weights(first, first.read_bytes())[1]
    assert load_record(tmp_path / "second.json") == record
    assert "init" not in run(stay, quiet=True)
    (tmp_path / "second.json").unlink()
    assert without_seconds(run(stay, out=tmp_path / "second.json", init=first, resume=True, quiet=True)["curve"])
    again = run(stay, out=tmp_path / "second.json", init=first, resume=True, quiet=True)  # finished
    assert again["init"] == record["init"]
    with pytest.raises(ExperimentError, match=r"second\.json: is the record of a run that started from other weights"):
        run(stay, out=tmp_path / "second.json", resume=True, quiet=True)
    (tmp_path / "second.json").unlink()
    with pytest.raises(ExperimentError, match=r"second\.ckpt: belongs to another run: init is '\w+' there"):
        run(stay, out=tmp_path / "second.json", resume=True, quiet=True)


def test_pruning_scores_the_weights_that_a_run_starts_from(small, trained, tmp_path):
    first, weights = trained
    pruned = {"optimizer.lr": 0.0, "pruning": {"method": "magnitude", "target_ratio": 0.9}, "training.seed": 3}
    run(load_config(small, pruned), out=tmp_path / "second.json", init=first, quiet=True)
    state = torch.load(tmp_path / "second.ckpt", weights_only=True)
    every = torch.cat([weights[name].abs().flatten() for name in state["masks"]])
    kept = torch.cat([state["masks"][name].flatten() for name in state["masks"]])
    assert every[kept].min() >= every[~kept].max() and 0.09 < kept.double().mean() < 0.11


def test_weights_that_do_not_fit_are_refused(small, trained, tmp_path):
    first, weights = trained
    state = torch.load(first, weights_only=True)
    hidden = weights["fc1.weight"].shape[0]
    shape = rf"first\.ckpt: .* fit the model: fc1\.weight is \({hidden}, 784\) there and \({hidden + 1}, 784\) here"
    missing = r"first\.ckpt: does not fit the model: fc1\.cores\.0 is not there"
    cases = [({"model.hidden": hidden + 1}, shape), ({"model": {"name": "MNIST_TTM"}}, missing)]
    for overrides, expected in cases:
        with pytest.raises(ExperimentError, match=expected) as caught:
            run(load_config(small, overrides), init=first, out=tmp_path / "second.json", quiet=True)
        assert "\n" not in str(caught.value)
    (tmp_path / "text.ckpt").write_bytes(b"weights")
    (tmp_path / "cut.ckpt").write_bytes(first.read_bytes()[:-50])
    for path, fault in [("no", "cannot be read: No such"), ("text", "damaged, or no"), ("cut", "damaged, or no")]:
        path = f"{path}.ckpt"
        with pytest.raises(ExperimentError, match=rf"{path}: {fault} ."):
            run(load_config(small), init=tmp_path / path, out=tmp_path / "second.json", quiet=True)
    torch.save(state | {"progress": {"best": {"model": [1]}}}, tmp_path / "odd.ckpt")
    with pytest.raises(ExperimentError, match=r"odd\.ckpt: damaged, or no checkpoint"):
        run(load_config(small), init=tmp_path / "odd.ckpt", out=tmp_path / "second.json", quiet=True)
    assert not list(tmp_path.glob("second*"))


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"identity": {}, "payload": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ExperimentError, match="damaged, or no checkpoint"):
        load_checkpoint(tmp_path / "evil.ckpt", (tmp_path / "evil.ckpt").read_bytes(), {})
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, {"identity": {"a": 1}, "step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"identity": {"a": 1}, "step": lambda: None})
    assert load_checkpoint(path, path.read_bytes(), {"a": 1})["step"] == 1


def test_where_the_record_may_lie(small, tmp_path):
    for out, expected in (
        (tmp_path / "record.txt", "ends in .json"),
        (tmp_path, "ends in .json"),
        (tmp_path / "nowhere" / "record.json", "nowhere does not exist"),
    ):
        with pytest.raises(ExperimentError, match=expected):
            run(load_config(small), out=out, quiet=True)
    with pytest.raises(ExperimentError, match="--out"):
        run(load_config(small), resume=True, quiet=True)


def test_records_that_cannot_be_read(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(ExperimentError, match=r"record\.json: no record can be read"):
        load_record(path)
    for content, expected in (("{", "no record can be read"), ("[]", "is no record"), ('{"name": 1}', "config, ")):
        path.write_text(content)
        with pytest.raises(ExperimentError, match=expected):
            load_record(path)
