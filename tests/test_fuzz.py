"""Whatever stands in a config, on the command line or in a mask: it is used, or one clear line says what is wrong."""

import copy

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.experiments import ExperimentError, load_config
from zo_tutorial.experiments.config import parse_overrides

FUZZED = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink what fails may take minutes
    suppress_health_check=list(HealthCheck),
)
ATIS = {
    "model": {"name": "Encoder", "d_model": 8, "heads": 2, "factors": [[2, 4]], "tensor_type": "TensorTrainMatrix"},
    "optimizer": {
        "name": "split",
        "heads": {"modules": ["intent"], "method": {"name": "SGD", "n_sample": 4}},
        "body": {"modules": ["blocks"], "method": {"name": "SCD", "grad_estimator": "esti", "h_smooth": 0.01}},
    },
    "scheduler": {"name": "cosine", "eta_min": 0.0},
    "training": {"epochs": 1, "batch_size": 16, "seed": 3},
}
MNIST = {
    "model": {"name": "MNIST_TTM", "in_factors": [4, 7, 7, 4], "max_rank": 2},
    "pruning": {"method": "random", "target_ratio": 0.5, "modules": ["fc1"]},
    "optimizer": {"name": "mix", "switch_epoch": 2, "SGD": {"lr": 0.1}, "SCD": {"STP": True, "adam": False}},
    "training": {"epochs": 1},
    "data": {"source": "embedded", "seed": 0},
}
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, 5e-324, 2**63, -0.0])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=12
)


def places(values, path=()):
    """The paths to all keys and items."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def configs(draw) -> dict:
    """A valid config with some values changed, keys added and keys removed."""
    config = copy.deepcopy(draw(st.sampled_from([ATIS, MNIST])))
    for _ in range(draw(st.integers(1, 3))):
        *groups, key = draw(st.sampled_from(list(places(config)) or [("model",)]))
        inside = config
        for group in groups:
            inside = inside[group]
        change = draw(st.sampled_from(["set", "add", "remove", "nest"]))
        if change == "set":
            inside[key] = draw(values)
        elif change == "nest":
            for _ in range(draw(st.sampled_from([1, 5, 50]))):
                inside[key] = {"name": inside[key]}
        elif change == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(scalars)] = draw(values)
    return config


def check(path, overrides=None) -> None:
    """The config is read, and has a hash; or one line says why not."""
    for quick in (False, True):
        try:
            assert len(load_config(path, overrides, quick).hash()) == 64
        except ExperimentError as error:
            assert str(path) in str(error) or "--set" in str(error)
            assert "\n" not in str(error) and len(str(error)) < 2000, error


@FUZZED
@given(config=configs())
def test_configs(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yml"
    path.write_text(yaml.dump(config, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    check(path)


@FUZZED
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-16", "surrogatepass")))
def test_files_that_are_anything(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "anything.yml"
    path.write_bytes(data)
    check(path)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting(depth, tmp_path):
    path = tmp_path / "deep.yml"
    path.write_text("model: " + "[" * depth + "]" * depth)
    check(path)


keys = st.text(max_size=10) | st.lists(st.sampled_from("optimizer SCD lr model training 0 .".split())).map(".".join)
texts = st.text(max_size=12) | values.map(lambda value: yaml.dump(value, default_flow_style=True).strip())


@FUZZED
@given(assignments=st.lists(st.tuples(keys, st.sampled_from(["=", "==", ""]), texts).map("".join), max_size=2))
def test_values_on_the_command_line(assignments, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "base.yml"
    path.write_text(yaml.dump(MNIST))
    try:
        overrides = parse_overrides(assignments)
    except ExperimentError as error:
        assert "\n" not in str(error)
        return
    check(path, overrides)


masks = st.sampled_from(
    [torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
    + [torch.ones(3, 4), torch.ones(4, 3, dtype=torch.bool), torch.tensor(True), torch.ones(0, dtype=torch.bool)]
)


@FUZZED
@given(
    given_masks=st.dictionaries(st.sampled_from(["weight", "bias", "other"]) | scalars, masks | values, max_size=3)
    | values
)
@pytest.mark.filterwarnings("ignore:masks")
def test_masks(given_masks):
    for cls in (ZO_SCD_mask, ZO_SGD_mask):
        torch.manual_seed(0)
        try:
            optimizer = cls(nn.Linear(4, 3), nn.functional.cross_entropy, given_masks)
        except ValueError as error:
            assert str(error).startswith("masks: ") and "\n" not in str(error), error
        else:
            optimizer.step(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))
