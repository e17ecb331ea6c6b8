"""Runs that torchrun starts: who speaks, who writes, and what happens when a worker dies."""

import json
import os
import subprocess
import sys

import pytest
import torch

from zo_tutorial.__main__ import main
from zo_tutorial.experiments import ExperimentError, load_config, run
from zo_tutorial.experiments.outputs import outputs
from zo_tutorial.experiments.record import SHARED
from zo_tutorial.experiments.tables import load_table, reproduce

CONFIG = """
model: {name: MNIST_FC, hidden: 4}
optimizer:
  name: mix
  switch_epoch: 2
  SGD: {lr: 0.01, sigma: 0.01, n_sample: 8}
  SCD: {lr: 0.02, h_smooth: 0.01, adam: true, grad_estimator: esti, grad_sparsity: 0.95}
training: {epochs: 2, batch_size: 1000}
data: {source: embedded}
"""
# The command line, but worker 1 is killed in its 24th message, in the second epoch, when it is started first.
MORTAL = """
import os, signal, sys
from zo_tutorial import workers
from zo_tutorial.__main__ import main

gather, messages = workers.Workers.gather, []

def mortal(*arguments):
    messages.append(1)
    if len(messages) == 24 and workers.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(*arguments)

workers.Workers.gather = mortal
sys.exit(main(sys.argv[1:]))
"""


def torchrun(folder, *arguments, restarts=0):
    script = folder / "mortal.py"
    script.write_text(MORTAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(script), "mnist", "-config", str(folder / "config.yml"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=150)


def test_a_lost_worker_is_one_line_and_a_restart_ends_as_an_undisturbed_run(tmp_path, capsys):
    (tmp_path / "config.yml").write_text(CONFIG)
    alone, killed, again = (tmp_path / f"{name}.json" for name in ("alone", "killed", "again"))
    run(load_config(tmp_path / "config.yml"), out=alone, quiet=True)

    result = torchrun(tmp_path, "--out", str(killed))
    assert result.returncode and not killed.exists()
    lines = [line for line in result.stderr.splitlines() if line.startswith("python -m zo_tutorial")]
    assert len(lines) == 1 and "error: worker 0 of 2: another worker has gone (" in lines[0]
    assert result.stdout.count("epoch 1/2:") == 1

    result = torchrun(tmp_path, "--out", str(again), restarts=3)
    assert result.returncode == 0, result.stderr
    assert "going on after step 4 of 8" in result.stdout and "2 workers shared queries, and sent " in result.stdout
    assert result.stdout.count("record: ") == 1

    assert main(["mnist", "-config", str(tmp_path / "config.yml"), "--out", str(killed), "--resume"]) == 0  # alone
    assert "going on after step 4 of 8" in capsys.readouterr().out
    states = [torch.load(out.with_suffix(".ckpt"), weights_only=True) for out in (alone, killed, again)]
    for state in states[1:]:
        assert all(torch.equal(value, state["model"][name]) for name, value in states[0]["model"].items())
    records = [json.loads(out.read_text()) for out in (alone, killed, again)]
    for key in ("queries", "test_accuracy", "config_hash"):
        assert len({record[key] for record in records}) == 1
    assert [key in records[0] for key in SHARED] == [False] * 3
    assert records[2]["workers"] == 2 and records[2]["share"] == "queries" and records[2]["bytes_sent"] > 0


def test_files_of_others_are_refused_with_one_line_and_by_restarts_too(tmp_path):
    (tmp_path / "config.yml").write_text(CONFIG)
    (tmp_path / "there.json").write_text("{}")
    result = torchrun(tmp_path, "--out", "there.json", restarts=1)  # restarted, it does not resume what is not its own
    lines = [line for line in result.stderr.splitlines() if line.startswith("python -m zo_tutorial")]
    expected = "there.json: exists already; resume that run, delete it or choose another record"
    assert lines == [f"python -m zo_tutorial: error: {expected}"] * 2
    assert (tmp_path / "there.json").read_text() == "{}"


# --- clusters --------------------------------------------------------------------------------------------------------


def test_a_record_is_written_by_one_process_only(tmp_path):
    (tmp_path / "config.yml").write_text(CONFIG)
    config, out = load_config(tmp_path / "config.yml"), tmp_path / "record.json"
    with outputs(config, out, None, False, None):
        with pytest.raises(ExperimentError, match=r"record\.json: another process is writing it"):
            run(config, out=out, quiet=True)
    assert not (tmp_path / "record.json.lock").exists()
    run(config, out=out, quiet=True)


def test_shards_are_all_runs_once(capsys):
    assert main(["reproduce", "mnist", "--list"]) == 0
    runs = capsys.readouterr().out.splitlines()
    found = []
    for shard in ("1/3", "2/3", "3/3"):
        assert main(["reproduce", "mnist", "--list", "--shard", shard]) == 0
        found.append(capsys.readouterr().out.splitlines())
    assert found == [runs[k::3] for k in range(3)]
    for shard in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3"):
        assert main(["reproduce", "mnist", "--list", f"--shard={shard}"]) == 2
        assert capsys.readouterr().err.endswith(f"--shard {shard}: should be I/N, from 1/N to N/N\n")


def test_what_another_process_is_making_is_left_to_it_and_waited_for(tmp_path):
    runs = load_table("mnist", quick=True, only="FC/SGD")[:1]
    with outputs(runs[0].config, tmp_path / runs[0].file, None, False, None):
        pid = os.fork()
        if not pid:
            try:
                records = reproduce(runs, tmp_path, jobs=1)
                os._exit(0 if isinstance(records[0], dict) else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / runs[0].file).exists()
