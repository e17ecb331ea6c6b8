"""Reading a config: a YAML file, values that win over it, and `quick`, which cuts it to seconds."""

import copy
import os
import re
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.fields import MODULES, NUMBER, Group
from zo_tutorial.experiments.schema import Config

CONFIGS = Path(__file__).parent.parent / "configs"
EMBEDDED_TRAINING = {"images": 4000, "sentences": 2000}  # of the embedded data, which every quick run uses
# A full step of coordinate descent asks thousands of queries, slow ones in `sign`, and slower ones of the encoder.
QUICK_SCD = {"esti": (32, 0.0), "batch": (32, 0.0), "sign": (32, 0.75), "encoder": (4, 0.95)}  # steps, share skipped
QUICK_SPLIT = 0.994  # share skipped where split skips any


def names() -> list[str]:
    """The configs of the package, by name: "MNIST/FC/FO"."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yml"))


def load_config(path: str | Path, overrides: dict | None = None, quick: bool = False) -> Config:
    """Read and check a config.

    Args:
        path: a file, or one of the package: "MNIST/FC/FO.yml", also with "configs/" before it or without ".yml".
        overrides: values by dotted key, {"optimizer.lr": 0.01}. They win over the file and over `quick`.
        quick: cut to seconds: embedded data and two epochs at most. Coordinate descent takes 32 steps, `sign` skips at
            least 75 % of the coordinates, and on the encoder it takes 4 steps that skip at least 95 %; split takes one
            epoch of 16 sentences a step at twice the learning rates, and where it skips coordinates at all, at least
            99.4 % of them. For a first look, not for a result.

    Raises:
        ExperimentError: in one line that names file, key and what is allowed.
    """
    file = _find(path)
    values = read_yaml(file, Config)
    for key, value in (overrides or {}).items():
        _set(values, key, copy.deepcopy(value), file)
    config = _check(values, file)
    if quick:
        for key, value in _quick(config).items():
            if key not in (overrides or {}):
                _set(values, key, value, file)
        config = _check(values, file)
    return config


def parse_overrides(assignments: list[str]) -> dict:
    """{"optimizer.lr": 0.01} of ["optimizer.lr=0.01"]; values are read as YAML. Raises ExperimentError."""
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise ExperimentError(f"--set {assignment}: should be key=value, such as optimizer.lr=0.01")
        try:
            overrides[key] = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ExperimentError(f"--set {assignment}: the value is no YAML: {_one_line(error)}") from error
    return overrides


def _quick(config: Config) -> dict:
    """What `quick` changes, by dotted key."""
    examples = EMBEDDED_TRAINING[config.about]
    epoch = -(-examples // config.training.batch_size)  # steps
    values = {"data.source": "embedded", "training.epochs": min(2, config.training.epochs)}
    if config.data.names != "own":
        values["data.names"] = "own"
    group = config.optimizer
    method = group.SCD if group.name == "mix" else group
    if method.name == "SCD":
        kind = "encoder" if config.about == "sentences" else method.grad_estimator
        steps, skipped = QUICK_SCD[kind]
        sparsity = _at_least(skipped, method.grad_sparsity)
    match group.name:
        case "FO" | "forward_mode" | "SGD":
            values["training.max_steps"] = 2 * epoch
        case "SCD":
            values["training.max_steps"] = steps
            values["optimizer.grad_sparsity"] = sparsity
        case "mix":
            values["training.max_steps"] = epoch + steps
            values["optimizer.switch_epoch"] = 2
            values["optimizer.SCD.grad_sparsity"] = sparsity
        case "split":
            values["training.batch_size"] = size = min(16, config.training.batch_size)
            values["training.max_steps"] = -(-examples // size)
            for name, part in (("heads", group.heads), ("body", group.body)):
                values[f"optimizer.{name}.method.lr"] = 2 * part.method.lr
                if part.method.name == "SCD" and part.method.grad_sparsity != 0:
                    sparsity = _at_least(QUICK_SPLIT, part.method.grad_sparsity)
                    values[f"optimizer.{name}.method.grad_sparsity"] = sparsity
    return values


def _at_least(skipped: float, sparsity: float | dict[str, float]) -> float | dict[str, float]:
    """`grad_sparsity` where nowhere less is skipped."""
    if isinstance(sparsity, dict):
        return {module: max(skipped, share) for module, share in sparsity.items()}
    return max(skipped, sparsity)


def _find(path: str | Path) -> Path:
    """The file itself, or the config of the package that is meant."""
    name = str(path).removeprefix("configs/").removesuffix(".yml")
    for file in (Path(os.path.expanduser(path)), CONFIGS / f"{name}.yml"):
        if file.is_file():
            return file
    raise ExperimentError(f"{path}: no such file, and no config of the package; --list shows those")


class _Loader(yaml.SafeLoader):
    """YAML without two surprises: 1e-3 is a number, and a key that is given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice, line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)


EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read_yaml(file: Path, kind: type[Group]) -> dict:
    """The values of a YAML file that should hold a group of this kind. Raises ExperimentError."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no UTF-8; nested too deeply
        raise ExperimentError(f"{file}: cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ExperimentError(f"{file}: should hold the groups {', '.join(kind.model_fields)}")
    return values


def _set(values: dict, key: str, value, file: Path) -> None:
    """Set one value by its dotted key, making the groups on the way."""
    *groups, last = key.split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ExperimentError(f"{file}: {key}: unknown key; {group} is a value, not a group of keys")
    values[last] = value


def _check(values: dict, file: Path) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ExperimentError(f"{file}: {explain(error.errors()[0])}") from error
    config._file = file
    return config


def explain(error: ErrorDetails) -> str:
    """One error of pydantic as "key: what is wrong and what is allowed"."""
    where, given, context = list(error["loc"]), error["input"], error.get("ctx", {})
    where = [key for key in where if key not in (NUMBER, MODULES)]
    group = Config.model_fields.get(str(where[0])) if len(where) > 1 else None
    if group and group.discriminator:
        del where[1]  # the name by which pydantic chose among several groups
    if "method" in where[:-1]:
        del where[where.index("method") + 1]
    match error["type"]:
        case "unknown_key":
            where.append(context["key"])
            message = error["msg"]
        case "baseline":
            where.append("baseline")
            message = error["msg"]
        case "missing":
            message = "is missing"
        case "union_tag_not_found":
            where.append("name")
            message = "is missing"
        case "union_tag_invalid":
            where.append("name")
            message = f"should be one of {context['expected_tags']}, not {context['tag']!r}"
        case _:
            message = f"{error['msg'].replace('Input s', 's')}, not {given!r}"
    return f"{'.'.join(map(str, where))}: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
