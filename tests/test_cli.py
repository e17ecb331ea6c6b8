"""The command line: what it prints, and one clear line with exit code 2 for every user's error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zo_tutorial import bench, viz
from zo_tutorial.__main__ import main
from zo_tutorial.experiments.record import FIELDS, RESULTS

PYTHON_M = [sys.executable, "-m", "zo_tutorial"]
FC = ["mnist", "-config", "MNIST/FC/FO.yml"]
QUICK = [*FC, "--quick", "--set", "training.max_steps=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *argv) -> str:
    """Run a command that must fail; return the last line on stderr, the error."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and err.endswith("\n")
    lines = err.splitlines()
    assert all(line.startswith(("usage:", " ")) for line in lines[:-1]), err  # argparse prints a usage line
    assert lines[-1].startswith("python -m zo_tutorial")
    return lines[-1]


def test_a_run_prints_its_data_its_epochs_and_its_record(capsys):
    assert main(QUICK) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "data: embedded MNIST; train 4,000, validation 500, test 500"
    assert out[1].startswith("epoch 1/1: loss ") and "validation" in out[1] and "2 queries" in out[1]
    assert out[2].startswith("MNIST/FC/FO: test ")
    record = json.loads(out[3])
    assert record["name"] == "MNIST/FC/FO" and record["queries"] == 2


def test_the_record_and_the_checkpoint_lie_beside_each_other(elsewhere, capsys):
    assert main([*QUICK, "--out", "record.json", "--seed", "7", "--epochs", "1", "--data", "embedded"]) == 0
    assert capsys.readouterr().out.endswith("record: record.json\n")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["record.ckpt", "record.json"]
    record = json.loads((elsewhere / "record.json").read_text())
    assert record["seed"] == 7 and record["config"]["training"]["seed"] == 7
    assert main([*QUICK, "--out", "record.json", "--seed", "7", "--epochs", "1", "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main([*QUICK, "--init", "record.ckpt", "--set", "optimizer.lr=0.", "--set", "pruning=null"]) == 0
    started = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert started["test_accuracy"] == record["test_accuracy"] and len(started["init"]) == 64


@pytest.mark.parametrize("path", ["configs/MNIST/TTM/FO.yml", "MNIST/TTM/FO.yml", "MNIST/TTM/FO"])
def test_a_config_of_the_package_is_found_from_anywhere(capsys, path):
    assert main(["mnist", "-config", path, "--quick", "--set", "training.max_steps=1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "MNIST/TTM/FO"


def test_a_file_here_comes_before_the_package(elsewhere, capsys):
    path = elsewhere / "configs" / "MNIST" / "FC" / "FO.yml"
    path.parent.mkdir(parents=True)
    path.write_text("model: {name: MNIST_FC, hidden: 5}\noptimizer: {name: FO}\ntraining: {epochs: 1}\n")
    assert main(["mnist", "-config", "configs/MNIST/FC/FO.yml", "--quick"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["name"] == "MNIST/FC/FO" and record["parameters"] == 5 * 794


def test_list(capsys):
    assert main(["mnist", "--list"]) == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == 31 and "MNIST/TTM/GraSP/SCD.yml" in lines


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0 and main(["mnist", "--help"]) == 0
    assert "never overwritten" in " ".join(capsys.readouterr().out.split())


def test_data_shows_what_there_is(elsewhere, capsys):
    assert main(["data", "--root", str(elsewhere)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data folder: {elsewhere}: no MNIST; --download gets it"
    assert lines[1].startswith("embedded MNIST")
    assert lines[2].split() == ["train", "4,000"] + ["400"] * 10
    assert lines[4].split() == ["test", "500"] + ["50"] * 10


@pytest.mark.skipif(not os.environ.get("ZO_TUTORIAL_DATA"), reason="needs full MNIST in $ZO_TUTORIAL_DATA")
def test_data_shows_full_mnist(capsys):
    assert main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": full MNIST")
    assert [line.split()[1] for line in lines[2:]] == ["55,000", "5,000", "10,000"]


def test_auto_without_data_warns_in_one_line(elsewhere, capsys, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody answers
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert main([*QUICK, "--data", "auto", "--root", str(elsewhere / "nowhere")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("data: embedded MNIST")
    warning = [line for line in err.splitlines() if line.startswith("warning: using the 5,000 embedded MNIST images")]
    assert len(warning) == 1 and str(elsewhere / "nowhere") in warning[0]
    last = error_of(capsys, *QUICK, "--data", "full", "--root", str(elsewhere / "nowhere"))
    assert "the download failed" in last


@pytest.mark.parametrize(("arguments", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_a_run_has_one_thread_or_as_many_as_are_asked_for(monkeypatch, capsys, arguments, threads):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr("zo_tutorial.__main__.run", lambda *_, **__: seen.append(torch.get_num_threads()) or {})
    assert main([*QUICK, *arguments]) == 0
    assert seen == [threads] and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: command"),
        (["encode"], "invalid choice: 'encode'"),
        (["mnist"], "mnist needs -config PATH; --list shows"),
        (["mnist", "--confg", "x"], "unrecognized arguments: --confg"),
        (["mnist", "-config", "missing.yml"], "missing.yml: no such file, and no config of the package"),
        (["mnist", "-config", "."], ".: no such file"),
        ([*FC, "--set", "optimizer.lrr=1"], "FO.yml: optimizer.lrr: unknown key; allowed: name, lr, momentum"),
        ([*FC, "--set", "optimizer.lr=fast"], "FO.yml: optimizer.lr: should be a valid number, not 'fast'"),
        ([*FC, "--set", "pruning.target_ratio=1.5"], "FO.yml: pruning.target_ratio: should be less than 1, not 1.5"),
        ([*FC, "--set", "pruning.target_ratio=1"], "FO.yml: pruning.target_ratio: should be less than 1, not 1"),
        ([*FC, "--set", "optimizer.lr"], "--set optimizer.lr: should be key=value"),
        ([*FC, "--set", "optimizer.opt_layers_strs=nn.Lin"], "opt_layers_strs.0: should be 'nn.Linear', 'nn.Conv2d'"),
        ([*FC, "--epochs", "0"], "FO.yml: training.epochs: should be greater than or equal to 1, not 0"),
        ([*FC, "--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        ([*FC, "--data", "cifar"], "argument --data: invalid choice: 'cifar'"),
        ([*FC, "--seed", "-1"], "FO.yml: training.seed: should be greater than or equal to 0, not -1"),
        ([*FC, "--resume"], "--out FILE.json"),
        ([*FC, "--init", "missing.ckpt"], "missing.ckpt: cannot be read: No such file or directory"),
        ([*FC, "--set", "data.names=full"], "FO.yml: data.names: images have none; leave it at own"),
        ([*FC, "--out", "record.txt"], "record.txt: the record should be a file whose name ends in .json"),
        ([*FC, "--out", ""], "the record should be a file whose name ends in .json"),
        ([*FC, "--out", "nowhere/record.json"], "nowhere/record.json: the folder nowhere does not exist"),
        ([*QUICK, "--threads", "0"], "--threads 0: should be at least 1"),
        (["bench", "--quick", "--threads", "-2"], "--threads -2: should be at least 1"),
        ([*QUICK, "--device", "gpu7"], "device 'gpu7' cannot be used"),
        ([*QUICK, "--set", "optimizer.opt_layers_strs=nn.Conv2d"], "FO.yml: optimizer: opt_layers_strs: the model has"),
        ([*QUICK, "--set", "optimizer.momentum=0.9"], "FO.yml: optimizer: adam has moments of its own"),
        ([*QUICK, "--set", "optimizer.adam=false", "--set", "optimizer.lr=1e35"], "the loss is"),
        (["data", "--roo", "x"], "unrecognized arguments: --roo"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(elsewhere, capsys, arguments, expected):
    assert expected in error_of(capsys, *arguments)
    assert not list(elsewhere.iterdir())


def test_bad_files_are_named_and_nothing_is_overwritten(elsewhere, capsys):
    bad = elsewhere / "bad.yml"
    bad.write_text("model: {name: MNIST_FC\n")
    assert "bad.yml: cannot be read as YAML" in error_of(capsys, "mnist", "-config", "bad.yml")
    raw = elsewhere / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0" * 100)
    for arguments in ([*FC, "--root", "."], ["data", "--root", "."]):
        last = error_of(capsys, *arguments)
        assert "MNIST/raw/train-images-idx3-ubyte is damaged: 100 bytes, not 47040016" in last
    record, checkpoint = elsewhere / "record.json", elsewhere / "record.ckpt"
    record.write_text("mine")
    assert "record.json: exists already" in error_of(capsys, *QUICK, "--out", "record.json")
    assert "record.json: no record can be read" in error_of(capsys, *QUICK, "--out", "record.json", "--resume")
    assert record.read_text() == "mine" and not checkpoint.exists()
    record.unlink()
    checkpoint.write_bytes(b"mine")
    assert "record.ckpt: exists already" in error_of(capsys, *QUICK, "--out", "record.json")
    last = error_of(capsys, *QUICK, "--out", "record.json", "--resume")
    assert "record.ckpt: damaged, or no checkpoint" in last
    assert checkpoint.read_bytes() == b"mine" and not record.exists()


def test_a_real_process_reports_an_error_without_traceback():
    command = [*PYTHON_M, *FC, "--set", "pruning.target_ratio=1.5"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("python -m zo_tutorial: error: ") and result.stderr.count("\n") == 1
    assert "FO.yml: pruning.target_ratio: should be less than 1, not 1.5" in result.stderr


# As PYTHON_M, but Ctrl-C is pressed when the first epoch has been saved.
INTERRUPTED = """
import os, signal, sys
from zo_tutorial.__main__ import main
from zo_tutorial.experiments import outputs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
save, saved = outputs.save_checkpoint, []

def save_and_interrupt(*arguments):
    save(*arguments)
    saved.append(1)
    if len(saved) == 2:  # the first is written at the start
        os.kill(os.getpid(), signal.SIGINT)

outputs.save_checkpoint = save_and_interrupt
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_says_how_to_go_on(elsewhere, capsys):
    arguments = [*QUICK, "--set", "training.max_steps=64", "--set", "optimizer={name: SGD}", "--out", "record.json"]
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 130
    error = result.stderr.splitlines()[-1]
    assert error.startswith("python -m zo_tutorial: interrupted; the same command with --resume goes on")
    torch.load("record.ckpt", weights_only=True)
    assert main([*arguments, "--resume"]) == 0
    assert "going on after step 32 of 64" in capsys.readouterr().out
    assert json.loads(Path("record.json").read_text())["queries"] == 64 * 41


def test_plot_draws_records(elsewhere, capsys):
    assert main([*QUICK, "--out", "record.json"]) == 0
    assert main(["plot", "record.json", "--out", "picture.png"]) == 0
    assert (elsewhere / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "missing.json" in error_of(capsys, "plot", "missing.json", "--out", "other.png")
    assert ".png" in error_of(capsys, "plot", "record.json", "--out", "picture.pdf")
    assert not (elsewhere / "other.png").exists()


def record_of(name: str, task: str, *measures: str) -> str:
    """A record as `run` writes it, in the fields that a plot reads."""
    curve = [{"epoch": n, "queries": 10 * n, **{f"val_{m}": n / 5 for m in measures}} for n in (1, 2, 3)]
    return json.dumps(dict.fromkeys(FIELDS + RESULTS[task]) | {"name": name, "curve": curve})


def test_plot_draws_records_of_the_encoder_and_no_mixture(elsewhere, capsys, monkeypatch):
    for k, name in enumerate(("ATIS/TTM/SCD_esti", "ATIS/TTM/FO", "ATIS/GraSP/SGD")):
        (elsewhere / f"atis{k}.json").write_text(record_of(name, "ATIS", "intent_accuracy", "slot_f1"))
    (elsewhere / "mnist.json").write_text(record_of("MNIST/TTM/SGD", "MNIST", "accuracy"))
    drawn, plot_curves = [], viz.plot_curves
    monkeypatch.setattr(viz, "plot_curves", lambda *args, **options: drawn.append(plot_curves(*args, **options)))
    assert main(["plot", "atis0.json", "atis1.json", "atis2.json", "--out", "picture.png"]) == 0
    assert [ax.get_ylabel() for ax in drawn] == ["validation intent accuracy", "validation slot F1"]
    assert all(len(ax.get_lines()) == 3 for ax in drawn)
    assert (elsewhere / "picture.png").read_bytes().startswith(b"\x89PNG")
    for order in (["atis0.json", "mnist.json"], ["mnist.json", "atis0.json", "mnist.json"]):
        assert "records of MNIST and of ATIS" in error_of(capsys, "plot", *order, "--out", "other.png")
    assert not (elsewhere / "other.png").exists()


def test_a_tilde_is_the_home_folder(elsewhere, capsys, monkeypatch):
    home = elsewhere / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.yml").write_text("model: {name: MNIST_FC, hidden: 5}\noptimizer: {name: FO}\ntraining: {epochs: 1}\n")
    assert main(["mnist", "-config", "~/mine.yml", "--quick", "--root", "~/data", "--out", "~/record.json"]) == 0
    assert main(["mnist", "-config", "~/mine.yml", "--quick", "--out", "~/record.json", "--resume"]) == 0
    assert main(["plot", "~/record.json", "--out", "~/picture.png"]) == 0
    assert main(["data", "--root", "~/data"]) == 0
    assert f"data folder: {home}/data: no MNIST" in capsys.readouterr().out
    monkeypatch.setattr(bench, "bench", lambda *arguments, **options: [])
    monkeypatch.setattr(bench, "plot", lambda rows, figure: None)
    assert main(["bench", "--out", "~/bench.json", "--plot", "~/bench.png"]) == 0
    one = ["reproduce", "mnist", "--quick", "--only", "MNIST/FC/FO", "--jobs", "1", "--out", "~/table"]
    assert main(one) == 0
    assert (home / "table" / "MNIST_FC_FO_s0.json").exists()
    names = {"mine.yml", "record.json", "record.ckpt", "picture.png", "bench.json", "bench.png", "table"}
    assert {path.name for path in home.iterdir()} == names
    assert [path.name for path in elsewhere.iterdir()] == ["home"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["mnist", "--list"], ["reproduce", "mnist", "--list"], QUICK, ["--help"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(arguments, unbuffered):
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run([*PYTHON_M, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 141 or (arguments == ["--help"] and unbuffered)  # argparse passes over it
