"""Hard knocks: runs killed at any moment, disks that are full, files that are damaged."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

from zo_tutorial.__main__ import main
from zo_tutorial.experiments import ExperimentError, load_config, run
from zo_tutorial.experiments.files import replacing
from zo_tutorial.experiments.outputs import outputs
from zo_tutorial.workers import WorkersError

MOMENTS = 20
SMALL = "model: {name: MNIST_FC, hidden: 4}\npruning: {target_ratio: 0.97, per_class: 5}\n"
TRAINING = "training: {epochs: 2, batch_size: 1000}\ndata: {source: embedded}\n"
ESTI = "{name: SCD, grad_estimator: esti, lr: 0.02, h_smooth: 0.01, adam: true}"
METHODS = {
    "esti": ESTI,
    "SGD": "{name: SGD, lr: 0.01, sigma: 0.01}",
    "sign": "{name: SCD, grad_estimator: sign, lr: 0.01}",
    "mix": "{name: mix, switch_epoch: 2, SGD: {lr: 0.01, sigma: 0.01}, SCD: {grad_estimator: batch, lr: 0.02}}",
}
ENCODER = f"""
model: {{name: Encoder, d_model: 4, heads: 2, d_hidden: 4, layers: 1, dropout: 0.1}}
optimizer:
  name: split
  heads: {{modules: [intent], method: {{name: SGD, lr: 0.01, n_sample: 2}}}}
  body: {{modules: [blocks], method: {ESTI.replace("0.02", "0.02, grad_sparsity: 0.9")}}}
training: {{epochs: 2, batch_size: 500, max_steps: 6}}
data: {{source: embedded}}
"""


def config_of(name, folder):
    text = ENCODER if name == "split" else f"{SMALL}optimizer: {METHODS[name]}\n{TRAINING}"
    path = folder / "config.yml"
    path.write_text(text)
    return load_config(path)


def forked(work, *arguments) -> int:
    """The process, not yet ended, that does some work and no more."""
    pid = os.fork()
    if pid:
        return pid
    tqdm.set_lock(threading.RLock())  # not the one of all processes: killed with that in hand, it would stop all
    try:
        work(*arguments)
        os._exit(0)
    except (WorkersError, ExperimentError):
        os._exit(2)
    finally:
        os._exit(1)


def go_on(config, out) -> None:
    """Train from where the run was left, with a checkpoint at every step."""
    run(config, out=out, resume=True, quiet=True, checkpoint_seconds=0)


def go_on_together(config, out, rank, rendezvous) -> None:
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    go_on(config, out)
    dist.destroy_process_group()


def weights_in(checkpoint) -> dict:
    state = torch.load(checkpoint, weights_only=True)
    return state["model"] | {f"best {name}": value for name, value in state["progress"]["best"]["model"].items()}


def check_like(out, expected) -> None:
    """The run has ended with the very weights and queries of another one."""
    mine, theirs = weights_in(out.with_suffix(".ckpt")), weights_in(expected.with_suffix(".ckpt"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", [*METHODS, "split"])
def test_a_run_killed_at_twenty_moments_ends_as_an_undisturbed_one(name, tmp_path):
    config, moments = config_of(name, tmp_path), random.Random(name)
    undisturbed, out = tmp_path / "undisturbed.json", tmp_path / "killed.json"
    go_on(config, undisturbed)
    whole, killed = seconds_of(config, tmp_path), 0
    while killed < MOMENTS:
        pid = forked(go_on, config, out)
        time.sleep(moments.uniform(0.0, whole))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if code == 0 and killed < MOMENTS:  # it was quicker: the next one begins anew
            check_like(out, undisturbed)
            out.unlink()
            out.with_suffix(".ckpt").unlink()
    go_on(config, out)
    check_like(out, undisturbed)


def hold(out) -> None:
    """Keep the lock of a record for a moment, as a child of a killed run does that is not yet another program."""
    with outputs(None, out, None, True, None):
        out.with_suffix(".held").touch()
        time.sleep(0.3)


def test_a_lock_that_is_given_back_in_a_moment_is_waited_for(tmp_path):
    out = tmp_path / "record.json"
    pid = forked(hold, out)
    while not out.with_suffix(".held").exists():
        time.sleep(0.01)
    with outputs(None, out, None, True, None):
        pass
    assert ended(pid) == 0


def ended(pid) -> int:
    """The exit code of a process; as torchrun does, it is not let wait for long for one that never joined it."""
    for _ in range(200):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.01)
    else:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seconds_of(config, folder) -> float:
    """What a whole run takes here, when everything is loaded."""
    began = time.perf_counter()
    go_on(config, folder / "timed.json")
    return time.perf_counter() - began


def test_two_workers_of_which_one_is_killed_go_on_and_end_as_one(tmp_path):
    config, moments = config_of("esti", tmp_path), random.Random(0)
    undisturbed, out = tmp_path / "undisturbed.json", tmp_path / "killed.json"
    go_on(config, undisturbed)
    whole, started, killed, lost = seconds_of(config, tmp_path), 0, 0, 0
    while killed < MOMENTS:
        meeting, started = tmp_path / f"rendezvous {started}", started + 1
        pids = [forked(go_on_together, config, out, rank, meeting) for rank in range(2)]
        time.sleep(moments.uniform(0.0, 1.5 * whole))
        os.kill(pids[moments.randrange(2)], signal.SIGKILL)
        codes = [ended(pid) for pid in pids]
        killed += -signal.SIGKILL in codes
        lost += sorted(codes) == [-signal.SIGKILL, 2]  # the other one said so
        if out.exists():
            check_like(out, undisturbed)
            out.unlink()
            out.with_suffix(".ckpt").unlink()
    assert lost
    go_on(config, out)  # and one alone finishes what two began
    check_like(out, undisturbed)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys):
    """A limit of file sizes stands for the end of the disk."""
    config, out = tmp_path / "config.yml", tmp_path / "record.json"
    config.write_text(f"{SMALL}optimizer: {METHODS['esti']}\n{TRAINING}")
    command = ["mnist", "-config", str(config), "--out", str(out)]
    assert main([*command, "--set", "training.epochs=1"]) == 0
    capsys.readouterr()
    checkpoint = out.with_suffix(".ckpt")
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), checkpoint.stat().st_size
    for limit in (100, size // 2, out.stat().st_size - 1):
        for left in (out, checkpoint):
            left.unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            assert main(command) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err
        assert error == f"python -m zo_tutorial: error: {checkpoint}: cannot be written: File too large\n"
        assert {path.name for path in tmp_path.iterdir()} <= {"config.yml", "record.ckpt"}


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path):
    config, out = config_of("esti", tmp_path), tmp_path / "record.json"
    checkpoint = out.with_suffix(".ckpt")
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill(point):
        size.append(checkpoint.stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size[0] // 2, before[1]))

    try:
        with pytest.raises(ExperimentError, match=r"record\.ckpt: cannot be written: File too large"):
            run(config, out=out, quiet=True, checkpoint_seconds=0, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(checkpoint, weights_only=True)["progress"]["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml", "record.ckpt"]
    go_on(config, out)
    go_on(config, tmp_path / "undisturbed.json")
    check_like(out, tmp_path / "undisturbed.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_device_is_named(tmp_path):
    out = tmp_path / "record.json"
    (tmp_path / "record.json.part").symlink_to("/dev/full")
    with pytest.raises(ExperimentError, match=r"record\.json: cannot be written: No space left on device"):
        with replacing(out) as file:
            file.write(b"x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    config, folder = config_of("esti", tmp_path).file, tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    places = [folder] if not os.access(folder, os.W_OK) else []  # for root there is no such folder
    for place in [*places, "/proc"]:
        assert main(["mnist", "-config", str(config), "--out", f"{place}/record.json"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"python -m zo_tutorial: error: {place}/record.json: cannot be written: ")
        assert error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "zo_tutorial", "mnist", "--list"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 2
    expected = "python -m zo_tutorial: error: the output cannot be written: No space left on device\n"
    assert result.stderr == expected


# --- interrupted -----------------------------------------------------------------------------------------------------


def interruptible(command, errors, ready) -> None:
    """The command line, as in a terminal."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr, sys.stdout = os.fdopen(2, "w"), os.fdopen(1, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ready.touch()
    code = main(command)
    sys.stderr.flush()
    os._exit(code)


def test_ctrl_c_at_any_moment_is_one_line_and_loses_nothing(tmp_path):
    config, moments = config_of("esti", tmp_path), random.Random(0)
    undisturbed, out = tmp_path / "undisturbed.json", tmp_path / "killed.json"
    go_on(config, undisturbed)
    whole, interrupted = seconds_of(config, tmp_path), 0
    command = ["mnist", "-config", str(config.file), "--out", str(out), "--resume"]
    for k in itertools.count():
        errors, ready = tmp_path / "errors", tmp_path / f"ready {k}"
        pid = forked(interruptible, command, errors, ready)
        while not ready.exists():
            time.sleep(0.001)
        time.sleep(0.005 + moments.uniform(0.0, whole))
        os.kill(pid, signal.SIGINT)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lines = [line for line in errors.read_text().splitlines() if "epoch" not in line and line.strip()]
        hint = f"python -m zo_tutorial: interrupted; the same command with --resume goes on from {out}"
        assert code in (0, 130) and lines == [hint] * (code == 130), lines
        assert not list(tmp_path.glob("killed.*.part")) and not list(tmp_path.glob("*.lock"))
        interrupted += code == 130
        if interrupted == MOMENTS:
            break
        if code == 0:  # it was quicker: the next one begins anew
            check_like(out, undisturbed)
            out.unlink()
            out.with_suffix(".ckpt").unlink()
    go_on(config, out)
    check_like(out, undisturbed)
