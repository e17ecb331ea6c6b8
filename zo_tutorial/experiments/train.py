"""One experiment from its config to its record: one loop for first-order and zeroth-order training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zo_tutorial import pruning
from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.outputs import outputs
from zo_tutorial.experiments.phases import Phase, blame, generator_of, phases_of
from zo_tutorial.experiments.record import commit, machine, versions
from zo_tutorial.experiments.schema import Config
from zo_tutorial.experiments.tasks import Task, task_of
from zo_tutorial.workers import Workers

BAR = "{desc} |{bar:16}| step {n}/{total}, {elapsed}<{remaining}{postfix}"  # of tqdm


def run(
    config: Config,
    *,
    root: str | Path | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    checkpoint_seconds: float = 30.0,
    on_epoch: Callable[[dict], None] = lambda point: None,
) -> dict:
    """Train and test as the config says; return the record, whose fields `zo_tutorial.experiments.record` lists.

    The weights of the epoch that is best on the validation part are tested, once, at the end.

    Args:
        config: from `load_config`.
        root: the data folder, see `load` of `zo_tutorial.data.mnist` and `zo_tutorial.data.atis`.
        device: "cpu", "cuda", …
        out: FILE.json, to which the record is written. FILE.ckpt beside it is the checkpoint, written at the start,
            after every epoch and every `checkpoint_seconds`. Neither may exist, unless the run resumes.
        init: FILE.ckpt of another run: the weights to start from, those of its best epoch, before any pruning. The
            record then has their sha256 as `init`.
        resume: go on from the checkpoint; from the start if there is none yet. Where the record of this very config is
            there already, return it.
        quiet: no progress bar and no printed line.
        on_epoch: called after each epoch, with its point of the curve.

    Raises:
        ExperimentError, DataError: a config, file or data that cannot be used; raised before anything is written.
        FloatingPointError: the loss became NaN or infinite.
        WorkersError: of several workers, in whose process group this runs, one was lost, or they do not agree.
    """
    workers = Workers.present()
    quiet = quiet or (workers is not None and workers.rank > 0)
    say = (lambda line: None) if quiet else tqdm.write
    with outputs(config, out, init, resume, workers) as files:
        if files.finished:
            say(f"{files.file}: finished already")
            return files.finished
        return _run(config, files, root, _device(device), quiet, say, checkpoint_seconds, on_epoch)


def _run(config, files, root, place, quiet, say, checkpoint_seconds, on_epoch) -> dict:
    task, workers = _task(config, root, place, files.workers), files.workers
    sizes = {part: len(getattr(task, part)[0]) for part in ("train", "validation", "test")}
    say(f"data: {task.name}; " + ", ".join(f"{part} {size:,}" for part, size in sizes.items()))
    identity = config.flat() | {"data found": task.source, "device": place.type}
    identity |= {"init": files.digest} if files.digest else {}
    saved = files.saved(identity)
    with blame(config, "model"):
        model = task.model(generator_of(config, "weights")).to(place)
    files.begin(model)
    if saved:
        masks = saved["masks"] and {name: mask.to(place) for name, mask in saved["masks"].items()}
    else:
        masks = _prune(config, model, task)
    epoch_steps = -(-sizes["train"] // config.training.batch_size)
    steps = config.training.epochs * epoch_steps
    steps = min(steps, config.training.max_steps or steps)
    phases = phases_of(config, model, task.loss, masks, epoch_steps, steps)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "examples": 0, "curve": []}
    progress["best"] = {"score": -1.0}
    if saved:
        progress = saved["progress"]
        model.load_state_dict(saved["model"])
        for phase, state in zip(phases, saved["phases"], strict=True):
            phase.optimizer.load_state_dict(state["optimizer"])
            phase.scheduler.load_state_dict(state["scheduler"])
        say(f"going on after step {progress['step']:,} of {steps:,}")

    def save():
        states = [{"optimizer": p.optimizer.state_dict(), "scheduler": p.scheduler.state_dict()} for p in phases]
        state = {"identity": identity, "masks": masks, "model": model.state_dict(), "phases": states}
        files.save(state | {"progress": progress})

    _train(config, task, model, phases, progress, steps, save, checkpoint_seconds, quiet, say, on_epoch)
    model.load_state_dict(progress["best"]["model"])
    results = task.results(progress["best"]["validation"], _measure(task, model, task.test))
    trained = {name: index for phase in phases for name, index in phase.optimizer.index.items()}
    record = {
        "name": config.name,
        "config": config.model_dump(),
        "config_hash": config.hash(),
        "seed": config.training.seed,
        "data": {"source": task.source, "seed": config.data.seed} | sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(map(len, trained.values())),
        "queries": _queries(phases),
        "seconds": progress["seconds"],
        "best_epoch": progress["best"]["epoch"],
        **results,
        **({"init": files.digest} if files.digest else {}),
        "curve": progress["curve"],
        "versions": versions(),
        "machine": machine(place),
        "commit": commit(),
    } | _shared(workers, phases)
    record = files.write(record)
    say(
        f"{config.name}: {task.outcome(results)} (epoch {record['best_epoch']}), "
        f"{record['trained_parameters']:,} trained parameters, {record['queries']:,} queries, {record['seconds']:.1f} s"
    )
    if workers:
        say(f"{workers.size} workers shared {record['share']}, and sent {record['bytes_sent']:,} bytes")
    return record


def _task(config: Config, root: str | Path | None, place: torch.device, workers: Workers | None) -> Task:
    """The problem, with its data. The first worker is the first to load them, for they may have to be downloaded."""
    found: list[Task] = []

    def load() -> bytes:
        found.append(task_of(config, root, place))
        return b""

    if workers is not None:
        workers.told(load)
    if not found:
        load()
    return found[0]


def _shared(workers: Workers | None, phases: list[Phase]) -> dict[str, Any]:
    """What a record of several workers holds too."""
    if workers is None:
        return {}
    queries = [phase.optimizer.loss_queries for phase in phases]
    shares = dict.fromkeys("queries" if one.sharing is not None else "batch" for one in queries)
    sent = sum(one.workers.bytes_sent for one in queries if one.workers is not None)
    return {"workers": workers.size, "share": " and ".join(shares), "bytes_sent": sent}


def _measure(task: Task, model: nn.Module, part: Any) -> dict[str, float]:
    """The metrics of the model, in evaluation mode, on a part of the data."""
    training = model.training
    model.eval()
    with torch.no_grad():
        metrics = task.measure(model, part)
    model.train(training)
    return metrics


def _train(config, task, model, phases, progress, steps, save, checkpoint_seconds, quiet, say, on_epoch) -> None:
    """Train from `progress`, which is kept up to date, to the last of `steps`."""
    epoch_steps = -(-len(task.train[0]) // config.training.batch_size)
    epochs = -(-steps // epoch_steps)
    # A whole epoch of coordinate descent can be millions of queries: the first one has points within it.
    early = {epoch_steps // part for part in (32, 16, 8, 4, 2)} if epoch_steps >= 32 else set()

    def point(epoch: float) -> tuple[dict, dict]:
        """The metrics where the weights stand, and a point of the curve."""
        metrics = _measure(task, model, task.validation)
        point = {
            "epoch": epoch,
            "queries": _queries(phases),
            "seconds": progress["seconds"],
            "loss": progress["loss_sum"] / progress["examples"],
        } | {f"val_{name}": value for name, value in metrics.items()}
        progress["curve"].append(point)
        return metrics, point

    if progress["step"] == 0:
        save()
    saved_at = time.perf_counter()
    first = progress["step"] // epoch_steps + 1 if progress["step"] < steps else epochs + 1
    for epoch in range(first, epochs + 1):
        before = (epoch - 1) * epoch_steps
        batches = task.batches(config.training.batch_size, generator_of(config, f"shuffle {epoch}"))[: steps - before]
        done = progress["step"] - before
        active = [phase for phase in phases if before in phase.steps]
        title, off = f"epoch {epoch}/{epochs}", quiet or None
        with tqdm(total=len(batches), initial=done, desc=title, bar_format=BAR, leave=False, disable=off) as bar:
            for batch in batches[done:]:
                started = time.perf_counter()
                moving = generator_of(config, f"shift {progress['step']}")
                inputs, targets = task.batch(task.train, batch.to(task.train[0].device), moving)
                losses = []
                for phase in active:
                    losses.append(phase.optimizer.step(inputs, targets)[1].item())
                    phase.scheduler.step()
                progress["seconds"] += time.perf_counter() - started
                progress["step"] += 1
                progress["loss_sum"] += losses[0] * len(batch)
                progress["examples"] += len(batch)
                validated = _validated(progress["curve"][-1]) if progress["curve"] else "validation –"
                bar.set_postfix_str(f"loss {losses[0]:.4f}, {validated}, {_queries(phases):,} queries", False)
                bar.update()
                if progress["step"] in early and progress["step"] < steps:
                    point(progress["step"] / epoch_steps)
                if progress["step"] < before + len(batches) and time.perf_counter() - saved_at >= checkpoint_seconds:
                    save()
                    saved_at = time.perf_counter()
        metrics, end = point(epoch)
        progress["loss_sum"], progress["examples"] = 0.0, 0
        if task.score(metrics) > progress["best"]["score"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch, "score": task.score(metrics), "validation": metrics, "model": weights}
            progress["best"] = best
        save()
        saved_at = time.perf_counter()
        on_epoch(end)
        say(
            f"epoch {epoch}/{epochs}: loss {end['loss']:.4f}, {_validated(end)}, "
            f"{end['queries']:,} queries, {end['seconds']:.1f} s"
        )


def _validated(point: dict) -> str:
    """The validation metrics of a point of the curve: "validation 97.10%", or one by one with their names."""
    metrics = {key.removeprefix("val_"): value for key, value in point.items() if key.startswith("val_")}
    if list(metrics) == ["accuracy"]:
        return f"validation {metrics['accuracy']:.2%}"
    return "validation " + ", ".join(f"{name} {value:.1%}" for name, value in metrics.items())


def _queries(phases: list[Phase]) -> int:
    return sum(phase.optimizer.queries for phase in phases)


def _prune(config: Config, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
    """The masks, with the removed weights of `model` set to zero; None without pruning."""
    if config.pruning is None:
        return None
    group, generator = config.pruning, generator_of(config, "pruning")
    ratio, modules = group.target_ratio, group.modules
    with blame(config, "pruning"):
        if group.method == "magnitude":
            masks = pruning.magnitude(model, ratio, modules)
        elif group.method == "random":
            masks = pruning.random(model, ratio, generator, modules)
        else:
            inputs, targets = task.sample(group.per_class, generator)
            seed = generator_of(config, "pruning dropout").initial_seed()
            if group.method == "snip":
                masks = pruning.snip(model, task.loss, inputs, targets, ratio, modules, seed=seed)
            else:
                masks = pruning.grasp(model, task.loss, inputs, targets, ratio, group.temperature, modules, seed=seed)
        if group.shuffle:
            masks = pruning.shuffle(masks, generator)
    pruning.apply_masks(model, masks)
    return masks


def _device(name: str) -> torch.device:
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ExperimentError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
