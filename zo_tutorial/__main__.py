"""The command line: python -m zo_tutorial mnist|encoder|run_tensors|reproduce|data|plot|bench; `--help` says all."""

import argparse
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from zo_tutorial import bench, viz
from zo_tutorial.bench import scaling
from zo_tutorial.data import DataError, mnist
from zo_tutorial.experiments import ExperimentError, load_config, load_record, run, tables
from zo_tutorial.experiments.config import names, parse_overrides
from zo_tutorial.experiments.files import replacing
from zo_tutorial.workers import WorkerLost, WorkersError, joined, rank

PROGRAM = "python -m zo_tutorial"
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
MEASURES = {"MNIST": ["val_accuracy"], "ATIS": ["val_intent_accuracy", "val_slot_f1"]}  # what `plot` draws


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a user's error, 130 after Ctrl-C. An error is one line on stderr.

    141, without a word, where the reader of the output has gone, as `head` does when it has its lines: a shell's code
    for that.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{PROGRAM}: error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2


def _run(argv: list[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stopped:  # argparse has printed help, or a usage line and the error
        return int(stopped.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _warn(message)
        try:
            arguments.command(arguments)
            return 0
        except OSError as error:
            if isinstance(error, BrokenPipeError) or (error.errno in FULL and not error.filename):
                raise  # of a file there would be a name: this is the output
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
            return 2
        except (ExperimentError, DataError, FloatingPointError, WorkersError) as error:
            # of several workers the first one speaks for all, where it can
            own = isinstance(error, DataError) or (rank() == 1 and isinstance(error, WorkerLost))
            if rank() == 0 or own:
                print(f"{PROGRAM}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if rank() > 0:
                return 130
            out = getattr(arguments, "out", None)
            hint = f"the same command with --resume goes on from {out}" if out else "--out would have kept it"
            if hasattr(arguments, "jobs"):
                hint = "the same command goes on where it stopped"
            print(f"{PROGRAM}: interrupted; {hint}", file=sys.stderr)
            return 130


def _warn(message: Warning | str) -> None:
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="Train without back-propagation.", allow_abbrev=False)
    listed = "mnist, encoder, run_tensors, reproduce, data, plot, bench"
    commands = parser.add_subparsers(required=True, metavar="command", help=listed)
    for name, folder, example, what in (
        ("mnist", "MNIST", "MNIST/FC/FO.yml", "an MNIST classifier"),
        ("encoder", "ATIS", "ATIS/TTM/FO.yml", "the encoder on ATIS"),
    ):
        train = commands.add_parser(name, allow_abbrev=False, help=f"train and test {what} from a config")
        train.set_defaults(command=_train, folder=folder, name=name)
        add = train.add_argument
        add("-config", metavar="PATH", help=f"a config file, or one of the package such as {example}")
        add("--list", action="store_true", help="print the package's configs and end")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value: --set optimizer.lr=0.01")
        add("--seed", type=int, help="training.seed")
        add("--epochs", type=int, help="training.epochs")
        add("--data", choices=("auto", "full", "embedded"), help="data.source")
        _add_machine(add)
        _add_threads(add)
        add("--quick", action="store_true", help="the same config cut to seconds: embedded data, few epochs and steps")
        add(
            "--out",
            metavar="FILE.json",
            help="write the record there (else print it) and the checkpoint to FILE.ckpt; files that are there are "
            "never overwritten, except by --resume",
        )
        add("--init", metavar="FILE.ckpt", help="start from the weights of another run, those of its best epoch")
        add("--resume", action="store_true", help="go on from the checkpoint of --out, from the start if there is none")
    turn = commands.add_parser("run_tensors", allow_abbrev=False, help="train the encoder and its rival in turn")
    turn.set_defaults(command=_run_tensors)
    what = "configs such as ATIS/TTM/FO; none: all but those of full size and of fine-tuning"
    turn.add_argument("names", nargs="*", metavar="NAME", help=what)
    turn.add_argument("--seed", type=int, help="training.seed")
    turn.add_argument("--data", choices=("auto", "full", "embedded"), help="data.source")
    again = commands.add_parser("reproduce", allow_abbrev=False, help="make a table of runs again, and compare")
    again.set_defaults(command=_reproduce)
    again.add_argument("table", nargs="?", choices=tables.table_names(), help="none: say what tables there are")
    again.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name contains TEXT")
    shard = "every N-th run from the I-th on: for the I-th of N jobs, which may share a folder"
    again.add_argument("--shard", metavar="I/N", help=shard)
    for several in (turn, again):
        add = several.add_argument
        add("--list", action="store_true", help="print the runs and end")
        add("--quick", action="store_true", help="cut to seconds each: embedded data, few epochs and steps, one seed")
        add("--jobs", type=int, metavar="N", help="runs at a time, each with one thread; default: one for each core")
        _add_machine(add)
        add(
            "--out",
            metavar="DIR",
            help="the folder of the records, default reproduced/TABLE or reproduced/run_tensors; those that are there "
            "are kept, and a run that was cut off goes on: the same command goes on where it stopped",
        )
    data = commands.add_parser("data", allow_abbrev=False, help="show which MNIST images there are")
    data.set_defaults(command=_data)
    data.add_argument("--root", metavar="DIR", help="the data folder, instead of $ZO_TUTORIAL_DATA or the user's cache")
    data.add_argument("--download", action="store_true", help="download MNIST into the data folder if it is not there")
    plot = commands.add_parser("plot", allow_abbrev=False, help="draw the learning curves of records on a query axis")
    plot.set_defaults(command=_plot)
    plot.add_argument("records", nargs="+", metavar="RECORD.json", help="records of mnist, or of encoder")
    path = os.path.expanduser
    plot.add_argument("--out", required=True, type=path, metavar="FILE.png", help="the picture; written anew")
    timing = commands.add_parser("bench", allow_abbrev=False, help="time the steps of all methods in all query modes")
    timing.set_defaults(command=_bench)
    add = timing.add_argument
    add("--quick", action="store_true", help="fewer rounds, more steps scaled from a sample: a minute")
    others = "models of other kinds (resnet18, …) instead, all weights trained: is `auto` ever slower than the loop?"
    add("--others", action="store_true", help=others)
    add("--peers", action="store_true", help="public libraries too: pip install 'zo_tutorial[peers]'")
    add("--workers", type=int, metavar="N", help="instead: what N workers of one thread gain over one (torchrun)")
    _add_threads(add)
    add("--out", type=path, metavar="FILE.json", help="write the rows there; written anew if it is there")
    add("--plot", type=path, metavar="FILE.png", help="a bar chart; written anew if it is there")
    return parser


def _add_machine(add: Callable) -> None:
    add("--root", metavar="DIR", help="the data folder, instead of $ZO_TUTORIAL_DATA or the user's cache")
    add("--device", default="cpu", help="cpu (the default), cuda, …")


def _add_threads(add: Callable) -> None:
    what = (
        "threads of torch, default 1: most operations are too short to share, and beside another busy process several "
        "threads wait for each other, many times as long (OMP_WAIT_POLICY=PASSIVE in the environment helps)"
    )
    add("--threads", type=int, default=1, metavar="N", help=what)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch have so many threads."""
    if count < 1:
        raise ExperimentError(f"--threads {count}: should be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(arguments: argparse.Namespace) -> None:
    if arguments.list:
        print("\n".join(f"{name}.yml" for name in names() if name.startswith(f"{arguments.folder}/")))
        return
    if not arguments.config:
        raise ExperimentError(f"{arguments.name} needs -config PATH; --list shows the package's configs")
    overrides = _overrides({"training.epochs": arguments.epochs}, arguments)
    config = load_config(arguments.config, parse_overrides(arguments.set) | overrides, arguments.quick)
    command = "encoder" if config.about == "sentences" else "mnist"
    if command != arguments.name:
        raise ExperimentError(f"{config.file}: trains a {config.model.name}; the command for it is {command}")
    with _threads(arguments.threads), joined(arguments.device):
        places = {key: getattr(arguments, key) for key in ("root", "device", "out", "init", "resume")}
        record = run(config, **places)
        if rank() == 0:
            print(f"record: {arguments.out}" if arguments.out else json.dumps(record))


def _overrides(values: dict, arguments: argparse.Namespace) -> dict:
    """The values by dotted key that are given on the command line."""
    values |= {"training.seed": arguments.seed, "data.source": arguments.data}
    return {key: value for key, value in values.items() if value is not None}


def _run_tensors(arguments: argparse.Namespace) -> None:
    provided = [name for name in names() if name.startswith("ATIS/")]
    chosen = [name.removeprefix("configs/").removesuffix(".yml") for name in arguments.names]
    chosen = chosen or [name for name in provided if "/full_" not in name and "/fine_tuning/" not in name]
    for name in chosen:
        if name not in provided:
            raise ExperimentError(f"{name}: is no encoder experiment of the package; there are {', '.join(provided)}")
    overrides = _overrides({}, arguments)
    runs = [tables.Run(name, load_config(name, overrides, arguments.quick)) for name in dict.fromkeys(chosen)]
    _run_all(runs, arguments, "run_tensors")


def _reproduce(arguments: argparse.Namespace) -> None:
    if arguments.table is None:
        raise ExperimentError(f"reproduce needs a table: {', '.join(tables.table_names())}")
    runs = tables.load_table(arguments.table, arguments.quick, arguments.only)
    if arguments.shard:
        runs = _shard(runs, arguments.shard)
    recorded = None if arguments.quick else tables.RECORDED / arguments.table
    _run_all(runs, arguments, arguments.table, recorded)


def _shard(runs: list, shard: str) -> list:
    """Every N-th run from the I-th on, of "I/N"."""
    first, _, count = shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ExperimentError(f"--shard {shard}: should be I/N, from 1/N to N/N")
    if int(first) > len(runs):
        raise ExperimentError(f"--shard {shard}: there are {len(runs)} runs only")
    return runs[int(first) - 1 :: int(count)]


def _run_all(runs: list, arguments: argparse.Namespace, folder: str, recorded: Path | None = None) -> None:
    """Make the runs, and compare them with those in the folder `recorded`."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ExperimentError(f"--jobs {arguments.jobs}: should be at least 1")
    if arguments.list:
        print("\n".join(f"{one.row}, seed {one.config.training.seed}" for one in runs))
        return
    out = Path(arguments.out or f"reproduced/{folder}{'_quick' if arguments.quick else ''}")
    records = tables.reproduce(runs, out, root=arguments.root, device=arguments.device, jobs=arguments.jobs)
    print(tables.comparison(runs, records, recorded))
    print(f"records: {out}")
    failed = sum(isinstance(record, str) for record in records)
    if failed:
        raise ExperimentError(f"{failed} of {len(runs)} runs failed")


def _data(arguments: argparse.Namespace) -> None:
    found = mnist.find(arguments.root)
    if not found and arguments.download:
        found = mnist.download(arguments.root)
    print(f"data folder: {mnist.folder(arguments.root)}: {'full MNIST' if found else 'no MNIST; --download gets it'}")
    data = mnist.load("full" if found else "embedded", arguments.root)
    print(f"{data.source + ' MNIST':16} {'images':>7}   of each class, 0 to 9")
    for part in ("train", "validation", "test"):
        labels = getattr(data, part).labels
        print(f"{part:16} {len(labels):7,}   {' '.join(map(str, labels.bincount().tolist()))}")


def _plot(arguments: argparse.Namespace) -> None:
    records = [load_record(path) for path in arguments.records]
    _check_picture(arguments.out)
    tasks = {"ATIS" if "baseline" in record else "MNIST" for record in records}
    if len(tasks) > 1:
        raise ExperimentError("records of MNIST and of ATIS share no axis: plot them one after the other")
    measures = MEASURES[tasks.pop()]

    def draw(figure) -> None:
        for ax, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
            viz.plot_curves(records, y=measure, ax=ax)

    _save_picture(arguments.out, draw, figsize=(5.8 * len(measures), 3.6))
    print(f"picture: {arguments.out}")


def _check_picture(path: str) -> None:
    if Path(path).suffix != ".png":
        raise ExperimentError(f"{path}: the picture should be a file whose name ends in .png")


def _save_picture(path: str, draw: Callable, **options) -> None:
    from matplotlib.figure import Figure

    viz.use_style()
    figure = Figure(**options)
    draw(figure)
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png", metadata={"Software": None})  # the same bytes whatever the version


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None:
        _scaling(arguments)
        return
    if arguments.plot:
        _check_picture(arguments.plot)
    peers = bench.installed() if arguments.peers else ()
    for peer in bench.PEERS if arguments.peers else ():
        if peer not in peers:
            print(f"warning: {peer} is not installed and left out; pip install 'zo_tutorial[peers]'", file=sys.stderr)
    for path in filter(None, (arguments.out, arguments.plot)):
        open(path, "ab").close()  # a folder that is not there is an error now, not in the end
    rows = []
    with _threads(arguments.threads):
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            rows += bench.bench(arguments.quick, device, peers=peers, others=arguments.others)
    print(bench.table(rows))
    if arguments.out:
        with replacing(Path(arguments.out)) as file:
            file.write((json.dumps(rows, indent=1) + "\n").encode())
    if arguments.plot:
        _save_picture(arguments.plot, lambda figure: bench.plot(rows, figure), figsize=(8.7, 3.8))


def _scaling(arguments: argparse.Namespace) -> None:
    if arguments.workers < 2:
        raise ExperimentError(f"--workers {arguments.workers}: should be at least 2")
    if arguments.out:
        open(arguments.out, "ab").close()
    before = os.getloadavg()[0]
    rows = scaling.scaling(arguments.workers, arguments.quick)
    print(scaling.table(rows))
    loads = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"{os.cpu_count()} cores; mean number of processes that wanted one in the last minute: {loads}")
    if arguments.out:
        with replacing(Path(arguments.out)) as file:
            file.write((json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
