"""Tables of runs: what they hold, that they go on where they stopped, and that no failure is hidden."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import yaml

from zo_tutorial.__main__ import main
from zo_tutorial.experiments import ExperimentError, load_record, load_table, reproduce, run, tables

SMALL = {
    "seeds": [0, 1],
    "set": {"data.source": "embedded", "training.epochs": 1, "training.max_steps": 3},
    "rows": [
        {"config": "MNIST/FC/FO", "vary": {"pruning.target_ratio": [0.5, 0.99]}},
        {"config": "MNIST/TTM/SGD", "name": "SGD, few", "set": {"optimizer.n_sample": 2}, "seeds": [3]},
    ],
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table "small" in place of the package's; the argument changes it."""
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        (tmp_path / "small.yml").write_text(yaml.safe_dump(SMALL | changes))
        return load_table("small")

    return write


@pytest.mark.parametrize("name", tables.table_names())
def test_every_table_of_the_package_is_valid_and_each_run_has_a_record_of_its_own(name):
    runs = load_table(name)
    made_from = {(one.config.hash(), one.start and one.start.hash()) for one in runs}
    assert len({one.file for one in runs}) == len(made_from) == len(runs)
    assert all(one.config.data.source == "embedded" for one in load_table(name, quick=True))


@pytest.mark.parametrize("name", [name for name in tables.table_names() if (tables.RECORDED / name).is_dir()])
def test_the_recorded_runs_are_those_of_the_table(name):
    runs = load_table(name)
    recorded = {path.name: load_record(path)["config_hash"] for path in (tables.RECORDED / name).glob("*.json")}
    assert recorded == {one.file: one.config.hash() for one in runs}


def test_rows_seeds_and_choices(table):
    runs = table()
    assert [one.file for one in runs] == [
        "MNIST_FC_FO_0.5_s0.json",
        "MNIST_FC_FO_0.5_s1.json",
        "MNIST_FC_FO_0.99_s0.json",
        "MNIST_FC_FO_0.99_s1.json",
        "SGD,_few_s3.json",
    ]
    assert runs[2].config.pruning.target_ratio == 0.99 and runs[4].config.optimizer.n_sample == 2
    assert [one.row for one in load_table("small", only="few")] == ["SGD, few"]
    assert len(load_table("small", quick=True)) == 3


def test_a_table_is_made_as_single_runs_make_it_and_is_not_made_twice(table, tmp_path):
    runs = table()
    records = reproduce(runs, tmp_path / "out", jobs=2)
    for one, record in zip(runs, records, strict=True):
        alone = run(one.config, quiet=True)
        assert record["test_accuracy"] == alone["test_accuracy"]
        assert record["curve"][0]["loss"] == alone["curve"][0]["loss"]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert set(files) == {one.file for one in runs}  # no checkpoint is left
    assert reproduce(runs, tmp_path / "out") == records
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_run_that_was_cut_off_goes_on(table, tmp_path):
    one = table(rows=[SMALL["rows"][1]], set={"data.source": "embedded", "training.epochs": 3})[0]

    class Killed(Exception):
        pass

    def kill(point):
        raise Killed

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Killed):
        run(one.config, out=out / one.file, quiet=True, on_epoch=kill)
    (record,) = reproduce([one], out)
    whole = run(one.config, quiet=True)
    assert [point["loss"] for point in record["curve"]] == [point["loss"] for point in whole["curve"]]


def test_rows_that_start_from_the_weights_of_a_run(table, tmp_path):
    """The run is made once for each seed, first and as it is; the weights are those of its best epoch."""
    begin = {
        "model": {"name": "MNIST_FC"},
        "optimizer": {"name": "FO", "lr": 0.01},
        "training": {"epochs": 1, "max_steps": 3},
        "data": {"source": "embedded"},
    }
    (tmp_path / "begin.yml").write_text(yaml.safe_dump(begin))
    stay = {"config": "MNIST/FC/FO", "start": "begin.yml", "set": {"pruning": None, "optimizer.lr": 0.0}}
    runs = table(rows=[stay | {"name": "stay"}, stay | {"name": "step", "set": {"pruning": None}}])
    records = reproduce(runs, tmp_path / "out", jobs=2)
    assert sorted(path.name for path in (tmp_path / "out" / "start").iterdir()) == [
        f"begin_s{seed}.{kind}" for seed in (0, 1) for kind in ("ckpt", "json")
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["start", *sorted(one.file for one in runs)]
    for seed, record in enumerate(records[:2]):
        begun = load_record(tmp_path / "out" / "start" / f"begin_s{seed}.json")
        assert record["test_accuracy"] == begun["test_accuracy"] != records[2 + seed]["test_accuracy"]
        assert record["init"] == records[2 + seed]["init"]
    # what is there is kept; where weights are wanted that are not there any more, their run is made again
    (tmp_path / "out" / runs[0].file).unlink()
    (tmp_path / "out" / "start" / "begin_s0.ckpt").unlink()
    again = reproduce(runs, tmp_path / "out", jobs=1)
    assert again[1:] == records[1:]
    assert all(again[0][key] == records[0][key] for key in ("init", "queries", "test_accuracy"))
    with pytest.raises(ExperimentError, match=r"stay_s0\.json: is a record of another start"):
        reproduce([one._replace(start=None) for one in runs], tmp_path / "out")
    (tmp_path / "out" / runs[0].file).unlink()
    (tmp_path / "begin.yml").write_text(yaml.safe_dump(begin | {"model": {"name": "MNIST_FC", "hidden": 9}}))
    (record,) = reproduce(load_table("small")[:1], tmp_path / "other", jobs=1)
    assert "begin_s0.ckpt: does not fit the model: fc1.weight is (9, 784) there and (256, 784) here" in record


def test_a_failure_is_told_and_the_other_runs_are_made(table, tmp_path, capsys):
    table(rows=[{"config": "MNIST/FC/SGD", "vary": {"optimizer.lr": [1e-3, 1e30]}, "seeds": [0]}])
    assert main(["reproduce", "small", "--jobs", "1"]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-2].startswith("MNIST/FC/SGD 1e+30") and "failed: " in lines[-2]
    assert lines[-3].startswith("MNIST/FC/SGD 0.001") and "failed" not in lines[-3]
    assert err.splitlines()[-1] == "python -m zo_tutorial: error: 1 of 2 runs failed"
    assert [path.name for path in (tmp_path / "reproduced/small").glob("*.json")] == ["MNIST_FC_SGD_0.001_s0.json"]


def test_a_record_of_other_values_is_never_taken_for_the_tables_own(table, tmp_path):
    runs = table()[:1]
    reproduce(runs, tmp_path / "out")
    changed = table(set=SMALL["set"] | {"optimizer.lr": 0.5})[:1]
    with pytest.raises(ExperimentError, match="other values"):
        reproduce(changed, tmp_path / "out")


def test_the_comparison_with_recorded_runs(table, tmp_path):
    runs = table()[:2]
    records = reproduce(runs, tmp_path)
    for record, accuracy in zip(records, (0.25, 0.75), strict=True):
        record["test_accuracy"] = accuracy
    for one, record in zip(runs, records, strict=True):
        (tmp_path / one.file).write_text(json.dumps(record | {"test_accuracy": 0.375}))
    row = tables.comparison(runs, records, tmp_path).splitlines()[1]
    assert "50.00 ± 35.36" in row and "37.50 ± 0.00" in row and row.endswith("+12.50")
    assert tables.comparison(runs, records).splitlines()[1].rstrip().endswith("50.00 ± 35.36")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": [{"config": "MNIST/none"}]}, "no such file"),
        ({"rows": [{"config": "MNIST/FC/FO", "set": {"optimizer.speed": 1}}]}, "optimizer.speed: unknown key"),
        ({"rows": [{"konfig": "MNIST/FC/FO"}]}, "rows.0.konfig: unknown key"),
        ({"seeds": "0"}, "seeds: should be a valid list"),
    ],
)
def test_a_bad_table_is_one_line(table, changes, message):
    with pytest.raises(ExperimentError, match=message):
        table(**changes)


def test_what_reproduce_says_of_bad_arguments(table, capsys):
    table()
    for arguments, message in {
        (): "reproduce needs a table: small",
        ("small", "--only", "none"): "no row's name contains 'none'",
        ("small", "--jobs", "0"): "--jobs 0: should be at least 1",
    }.items():
        assert main(["reproduce", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["reproduce", "small", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "MNIST/FC/FO 0.5, seed 0"


# The command, with the interrupt of the terminal on, whatever the parent of the test has done with it.
COMMAND = """
import signal, sys
from zo_tutorial.__main__ import main
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = [sys.executable, script, "reproduce", "pruning", "--quick", "--only", "0.99", "--jobs", "1"]
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **options)
    folder, deadline = tmp_path / "reproduced/pruning_quick", time.monotonic() + 120
    while not list(folder.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1].endswith("interrupted; the same command goes on where it stopped")
    kept = {path.name for path in folder.glob("*.json")}
    again = subprocess.run(command, capture_output=True, **options)
    assert again.returncode == 0, again.stderr
    made = {line.split(":")[0] for line in again.stdout.splitlines() if line.split(":")[0].endswith(".json")}
    assert kept and kept.isdisjoint(made) and len(kept | made) == 10


KILLED = """
import sys
from pathlib import Path
from zo_tutorial.__main__ import main
from zo_tutorial.experiments import tables
if __name__ == "__main__":
    tables.TABLES = Path.cwd()
    sys.exit(main(["reproduce", "small", "--jobs", "1", "--out", "made"]))
"""


def test_a_command_that_is_killed_leaves_no_process_behind(table, tmp_path):
    table(rows=[{"config": "MNIST/TTM/SCD_esti"}], set={"data.source": "embedded"})  # takes minutes
    (tmp_path / "command.py").write_text(KILLED)
    process = subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "made").glob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and list((tmp_path / "made").glob("*.lock"))
    process.kill()  # the one process that was started, not the one that it has started
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    try:
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
