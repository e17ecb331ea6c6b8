"""Whole tables of recorded runs: `python -m zo_tutorial reproduce` makes them again and compares.

A table is a YAML file of rows. A row is a config of the package, values that it changes, and seeds; each seed is a run
of its own, with a record of its own.
"""

import itertools
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, ValidationError
from tqdm import tqdm

from zo_tutorial.data import DataError, atis, mnist
from zo_tutorial.experiments.checkpoint import checkpoint_path
from zo_tutorial.experiments.config import explain, load_config, read_yaml
from zo_tutorial.experiments.errors import BusyError, ExperimentError
from zo_tutorial.experiments.fields import Group
from zo_tutorial.experiments.record import load_record
from zo_tutorial.experiments.schema import Config
from zo_tutorial.experiments.train import run

TABLES = Path(__file__).parent.parent / "tables"
_done: Synchronized  # epochs done by all processes of a table; of one that `_start` began
SET_BY_QUICK = ("data.source", "training.epochs", "training.max_steps", "optimizer.grad_sparsity")
RECORDED = Path(__file__).parents[2] / "book" / "results"  # of a source tree; an installed package has none
BAR = "{desc} |{bar:16}| epoch {n}/{total}, {elapsed}<{remaining}{postfix}"  # of tqdm

Seeds = list[int]


class Row(Group):
    config: str = Field(description="a config of the package, such as MNIST/TTM/SCD_esti")
    name: str | None = Field(None, description="none: the config's name")
    set: dict = Field({}, description="values that differ from the config's, by dotted key")
    vary: dict[str, list] = Field({}, description="dotted keys, each with a list: a row of its own for each choice")
    seeds: Seeds | None = Field(None, description="none: the table's seeds")
    start: str | None = Field(
        None, description="a config of the package, run first as it is, with the same seed: its weights to start from"
    )


class Table(Group):
    """A file of the folder tables."""

    seeds: Seeds = Field(description="training.seed of the runs of each row")
    set: dict = Field({}, description="values by dotted key, for all rows")
    rows: list[Row]


class Run(NamedTuple):
    """One run of a table."""

    row: str  # the name of its row
    config: Config
    start: Config | None = None  # of the run whose weights it starts from

    @property
    def file(self) -> str:
        """The name of its record: MNIST_TTM_SCD_esti_s0.json."""
        return f"{self.row.replace('/', '_').replace(' ', '_')}_s{self.config.training.seed}.json"


def table_names() -> list[str]:
    """The tables of the package."""
    return sorted(path.stem for path in TABLES.glob("*.yml"))


def load_table(name: str, quick: bool = False, only: str = "") -> list[Run]:
    """The runs of a table of the package, in its order.

    Args:
        name: one of `table_names()`.
        quick: each config cut to seconds (see `load_config`), the first seed alone.
        only: keep the rows whose name contains this.

    Raises:
        ExperimentError: no such table, no such row, or a table or config that cannot be used.
    """
    if name not in table_names():
        raise ExperimentError(f"{name}: no such table; choose from {', '.join(table_names())}")
    file = TABLES / f"{name}.yml"
    try:
        table = Table.model_validate(read_yaml(file, Table))
    except ValidationError as error:
        raise ExperimentError(f"{file}: {explain(error.errors()[0])}") from error
    runs = []
    for row in table.rows:
        for values in itertools.product(*row.vary.values()):
            label = " ".join([row.name or row.config, *map(str, values)])
            overrides = table.set | row.set | dict(zip(row.vary, values, strict=True))
            if quick:
                overrides = {key: value for key, value in overrides.items() if key not in SET_BY_QUICK}
            seeds = table.seeds if row.seeds is None else row.seeds
            for seed in seeds[:1] if quick else seeds:
                start = load_config(row.start, {"training.seed": seed}, quick) if row.start else None
                runs.append(Run(label, load_config(row.config, overrides | {"training.seed": seed}, quick), start))
    found = [one for one in runs if only in one.row]
    if not found:
        raise ExperimentError(f"{name}: no row's name contains {only!r}; --list shows them")
    return found


def reproduce(
    runs: Sequence[Run],
    out: str | Path,
    *,
    root: str | Path | None = None,
    device: str = "cpu",
    jobs: int | None = None,
) -> list[dict | str]:
    """Make all runs, `jobs` of them at a time; return their records in order, an error's text where a run failed.

    Args:
        runs: of `load_table`.
        out: a folder, made if it is not there. A record that lies there already is taken as it is, and a run that was
            cut off goes on from its checkpoint: so the same command goes on where it stopped. Several processes may
            share the folder: what one of them is making, the others leave to it, and wait for in the end. The folder
            `start` in it has the runs whose weights others start from, with their checkpoints.
        root, device: as for `run`.
        jobs: processes, each with one thread; None: one for each processor core.

    Raises:
        ExperimentError, DataError: a record in the folder that is another run's; data that cannot be had; a run that
            failed and that others start from.
    """
    out = Path(os.path.expanduser(out))
    waiting = [one.start for one in runs if one.start and not _finished(one, out)]
    starts = {config.hash(): Run(config.name, config) for config in waiting}
    for record in _made(list(starts.values()), out / "start", root, device, jobs, keep=True) if starts else ():
        if isinstance(record, str):
            raise ExperimentError(f"{out / 'start'}: {record}")
    return _made(runs, out, root, device, jobs)


def _made(runs: Sequence[Run], out: Path, root, device: str, jobs: int | None, keep: bool = False) -> list[dict | str]:
    """`reproduce` of runs whose starts are there; `keep` their checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    records: dict[int, dict | str] = {}
    for k, one in enumerate(runs):
        record = _finished(one, out)
        if record and keep and not checkpoint_path(out / one.file).exists():
            (out / one.file).unlink()  # a record without the weights that are wanted
        elif record:
            records[k] = record
    waiting = [k for k in range(len(runs)) if k not in records]
    epochs = sum(runs[k].config.training.epochs for k in waiting)
    with tqdm(total=epochs, desc=f"{len(runs)} runs", bar_format=BAR, disable=None) as bar:
        jobs = min(jobs or os.cpu_count() or 1, max(1, len(waiting)))
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads of torch that do not run
        done = context.Value("q", 0)  # epochs
        for about, data in {(runs[k].config.about, runs[k].config.data) for k in waiting}:
            # downloads once, and fails here where it must
            if about == "sentences":
                atis.load(data.source, root, names=data.names)
            else:
                mnist.load(data.source, root)
        tasks_of = {k: (k, runs[k], out, root, device, keep) for k in waiting}
        with context.Pool(jobs, _start, (done,)) as pool:  # left by an exception, it ends its processes
            results, left = pool.imap_unordered(_work, list(tasks_of.values())), len(tasks_of)
            while waiting:
                if not left:  # what is waited for, other processes make: see again what they have finished
                    time.sleep(1)
                    results, left = pool.imap_unordered(_work, [tasks_of[k] for k in waiting]), len(waiting)
                try:
                    k, result = results.next(timeout=0.5)
                    left -= 1
                    if result is not None:
                        waiting.remove(k)
                        records[k] = result
                        bar.set_postfix_str(f", {len(runs) - len(waiting)} of {len(runs)} runs done", False)
                        tqdm.write(f"{runs[k].file}: {_outcome(result)}")
                except multiprocessing.TimeoutError:
                    pass
                bar.update(done.value - bar.n)
    return [records[k] for k in range(len(runs))]


def comparison(runs: Sequence[Run], records: Sequence[dict | str], recorded: Path | None = None) -> str:
    """A line for each row: what it took, and its test metrics in per cent, mean and standard deviation over the seeds.
    Behind each metric the same from the records in the folder `recorded`, with the change of the mean in points."""
    width = max(len(one.row) for one in runs)
    lines = []
    for row in dict.fromkeys(one.row for one in runs):
        here = [record for one, record in zip(runs, records, strict=True) if one.row == row]
        made = [record for record in here if isinstance(record, dict)]
        if not made:
            lines.append(f"{row:{width}} failed: {here[0]}")
            continue
        files = [recorded / one.file for one in runs if one.row == row] if recorded else []
        there = [load_record(file) for file in files if file.exists()]
        queries, seconds = (statistics.mean(record[key] for record in made) for key in ("queries", "seconds"))
        line = f"{row:{width}} {made[0]['trained_parameters']:>8,} {queries:>12,.0f} {seconds:>8.1f}"
        header = f"{'':{width}} {'weights':>8} {'queries':>12} {'seconds':>8}"
        for measure in _measures(made[0]):
            now, then = ([_measures(record)[measure] for record in some] for some in (made, there))
            line += f"  {_spread(now):<12}"
            header += f"  {measure:<12}  {'recorded':<12}  change"
            if then:
                line += f"  {_spread(then):<12}  {statistics.mean(now) - statistics.mean(then):+.2f}"
            else:
                line += " " * 22
        if not lines:
            lines.append(header)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _measures(record: dict) -> dict[str, float]:
    """What a table compares, in per cent, by its heading."""
    if "test_accuracy" in record:
        return {"test %": 100 * record["test_accuracy"]}
    test = record["test"]
    return {
        "intent %": 100 * test["intent_accuracy"],
        "slot F1 %": 100 * test["slot_f1"],
        "token %": 100 * test["token_accuracy"],
    }


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return text


def _outcome(result: dict | str) -> str:
    if isinstance(result, str):
        return f"failed: {result}"
    measures = ", ".join(f"{name.removesuffix(' %')} {value:.2f}%" for name, value in _measures(result).items())
    return f"{measures}, {result['queries']:,} queries, {result['seconds']:.1f} s"


def _finished(one: Run, out: Path) -> dict | None:
    path = out / one.file
    if not path.exists():
        return None
    record = load_record(path)
    if record["config_hash"] != one.config.hash():
        raise ExperimentError(f"{path}: is a record of other values; move it, or choose another --out")
    if ("init" in record) != (one.start is not None):
        raise ExperimentError(f"{path}: is a record of another start; move it, or choose another --out")
    return record


def _start(done) -> None:
    """In a new process: one thread, and Ctrl-C is for the process that started this one, which it does not outlive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, between processes, would outlive one that is ended
    torch.set_num_threads(1)
    global _done
    _done = done


def _end_with(parent) -> None:
    """End this process when another one ends, killed or not: the checkpoint is as good as after any kill."""
    parent.join()
    os._exit(1)


def _work(task: tuple) -> tuple[int, dict | str | None]:
    """A record, or the error; None where another process is at it."""
    k, one, out, root, device, keep = task
    path, epochs = out / one.file, one.config.training.epochs
    seen = 0

    def count(point: dict) -> None:
        nonlocal seen
        with _done.get_lock():
            _done.value += point["epoch"] - seen
        seen = point["epoch"]

    init = one.start and checkpoint_path(out / "start" / Run(one.start.name, one.start).file)
    try:
        record = run(one.config, root=root, device=device, out=path, init=init, resume=True, quiet=True, on_epoch=count)
        if not keep:  # a table keeps records only
            checkpoint_path(path).unlink(missing_ok=True)
        return k, record
    except BusyError:
        epochs = seen
        return k, None
    except (ExperimentError, DataError, OSError, FloatingPointError) as error:
        return k, str(error)
    finally:
        count({"epoch": epochs})
