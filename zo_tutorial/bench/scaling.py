"""What several workers gain: `python -m zo_tutorial bench --workers 2`, which starts torchrun with this module.

Worker 0 takes a step alone while the others wait; then each takes the whole step by itself, all at the same time; then
all take it together. So it goes again and again, and all three are timed in the same minute, on the same machine. Each
worker has one thread. Alone and together they begin with the same weights, and must end with the same, bit for bit. The
methods are those of the configs.

`gain` is by the clock. Where other processes run beside, it says more of them than of the workers; then `core gain`
tells what a core for each worker would give: the processor time of a step alone over that of the busiest worker.
`fixed` is what a step takes outside of its queries, and every worker repeats: the first pass, directions, estimate and
update. `bound` is the gain that this leaves (Amdahl). `beside` is the step by itself while the other cores do the same:
where it takes longer than alone, the workers are in each other's way with no word said, and the gain cannot exceed
`bound` times alone over beside. `balance` is the mean over the busiest of the workers' processor times. `repeated` is
the share of a step that each worker does anew, within its queries too: what the shared step takes of processor time in
all, over what whole steps side by side take, tells it. Chapter 12.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from zo_tutorial.bench.cases import Case, cases_of_book
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.optimizer.base import ZerothOrderOptimizer
from zo_tutorial.workers import joined, rank

WARM = 5  # steps
LEARNT = 100  # first-order steps before; see `_on_its_way`
SGD: dict[str, Any] = dict(n_sample=200, sigma=1e-2, lr=1e-3)
ESTI: dict[str, Any] = dict(grad_estimator="esti", grad_sparsity=0.0, h_smooth=1e-2, adam=True, lr=1e-3)
BODY: dict[str, Any] = ESTI | dict(STP=False, h_smooth=3e-3)
# Name: the cases that a step trains, each with its method.
STEPS: dict[str, list[tuple[str, Callable[..., ZerothOrderOptimizer], dict[str, Any]]]] = {
    "CNN esti": [("CNN", ZO_SCD_mask, ESTI)],
    "TTM esti": [("TTM", ZO_SCD_mask, ESTI)],
    "encoder esti": [("heads", ZO_SCD_mask, ESTI), ("body", ZO_SCD_mask, BODY)],
    "FC SGD": [("FC", ZO_SGD_mask, SGD)],
    "TTM SGD": [("TTM", ZO_SGD_mask, SGD)],
    "CNN SGD": [("CNN", ZO_SGD_mask, SGD)],
}


class Step:
    """A step of one of `STEPS` on models of its own."""

    def __init__(self, name: str, cases: dict[str, Case]):
        kept = copy.deepcopy({case: cases[case] for case, _, _ in STEPS[name]})
        self.batches = [case.batch for case in kept.values()]
        self.models = [case.model for case in kept.values()]
        self.asking, self.seconds, self.busy = list[float](), list[float](), list[float]()
        self.optimizers = []
        for case, cls, options in STEPS[name]:
            model, masks, _, criterion, *_ = kept[case]
            more = dict(parameters=kept[case].parameters(), generator=torch.Generator().manual_seed(0))
            made = cls(model, criterion, masks, **options, **more)
            made.loss_queries.ask = self._noted(made.loss_queries.ask)  # type: ignore[method-assign]  # to time it
            self.optimizers.append(made)

    def run(self) -> None:
        self.asked = 0.0
        started, worked = time.perf_counter(), time.process_time()
        for optimizer, batch in zip(self.optimizers, self.batches, strict=True):
            optimizer.step(*batch)
        self.seconds.append(time.perf_counter() - started)
        self.busy.append(time.process_time() - worked)
        self.asking.append(self.asked)

    def _noted(self, ask: Callable) -> Callable:
        def noted(rounds):
            started = time.perf_counter()
            answers = ask(rounds)
            self.asked += time.perf_counter() - started
            return answers

        return noted


def _on_its_way(case: Case) -> Case:
    """A network that is trained as a whole, after some first-order steps, for a run spends its time behind its start.

    At the start of the CNN too many numbers are near a kink, and the queries of its first convolution take twice as
    long: one unit, more than half of the step, so that two workers cannot have the same share.
    """
    if case.masks is not None or case.chosen is not None:
        return case
    adam = torch.optim.Adam(case.model.parameters(), 1e-3)
    inputs, targets = case.batch
    for _ in range(LEARNT):
        adam.zero_grad()
        case.criterion(case.model(inputs), targets).backward()
        adam.step()
    adam.zero_grad()
    return case


def scaling(workers: int, quick: bool) -> list[dict]:
    """Time all `STEPS` with one worker and with so many.

    Returns:
        Rows with `step, workers, queries, alone_s, beside_s, together_s, gain, core_gain, lowest, highest, fixed_s,
        bound, balance, repeated, bytes, same_bits`: queries and bytes of a step, medians in seconds, the ratio of the
        medians, the same by processor time, and the lowest and highest ratio of a pair of steps.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command = [*torchrun, "-m", "zo_tutorial.bench.scaling", "5" if quick else "21"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise OSError(f"torchrun ended with exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """The rows as text, one a line."""
    lines = [
        f"{'step':13} {'workers':>7} {'queries':>8} {'alone ms':>9} {'beside ms':>9} {'shared ms':>9} "
        f"{'gain':>5}  {'from–to':9} {'core gain':>9} {'fixed ms':>8} {'bound':>5} {'balance':>7} {'bytes':>8} "
        "same bits"
    ]
    for row in rows:
        spread = f"{row['lowest']:.2f}–{row['highest']:.2f}"
        lines.append(
            f"{row['step']:13} {row['workers']:7} {row['queries']:8,} {1e3 * row['alone_s']:9.1f} "
            f"{1e3 * row['beside_s']:9.1f} {1e3 * row['together_s']:9.1f} {row['gain']:5.2f}  {spread:9} "
            f"{row['core_gain']:9.2f} {1e3 * row['fixed_s']:8.1f} {row['bound']:5.2f} {row['balance']:7.2f} "
            f"{row['bytes']:8,} {'yes' if row['same_bits'] else 'NO'}"
        )
    return "\n".join(lines)


def _row(name: str, cases: dict[str, Case], alone: Step, beside: Step, rounds: int) -> dict:
    """A row, on worker 0."""
    size, together = dist.get_world_size(), Step(name, cases)
    shared = [optimizer.loss_queries for optimizer in together.optimizers]
    for done in range(WARM + rounds):
        dist.barrier()
        if rank() == 0:
            alone.run()
        dist.barrier()
        beside.run()
        if done == WARM:
            before = sum(queries.count for queries in shared), _sent(shared)
        dist.barrier()
        together.run()
    after = sum(queries.count for queries in shared), _sent(shared)
    weights = [[p for model in step.models for p in model.parameters()] for step in (alone, together)]
    one, many = alone.seconds[WARM:], together.seconds[WARM:]
    alone_s, together_s = (statistics.median(seconds or [1.0]) for seconds in (one, many))
    mine = torch.tensor(statistics.median(together.busy[WARM:]), dtype=torch.float64)
    busy = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(busy, mine)
    spent = [one.item() for one in busy]
    whole = torch.tensor(statistics.median(beside.busy[WARM:]), dtype=torch.float64)
    dist.all_reduce(whole)  # of N steps
    fixed = statistics.median([a - b for a, b in zip(one, alone.asking[WARM:], strict=True)] or [1.0])
    ratios = [a / b for a, b in zip(one or many, many, strict=True)]
    return {
        "step": name,
        "workers": size,
        "queries": (after[0] - before[0]) // rounds,
        "alone_s": alone_s,
        "beside_s": statistics.median(beside.seconds[WARM:]),
        "together_s": together_s,
        "gain": alone_s / together_s,
        "core_gain": statistics.median(alone.busy[WARM:] or [1.0]) / max(spent),
        "lowest": min(ratios),
        "highest": max(ratios),
        "fixed_s": fixed,
        "bound": alone_s / (fixed + (alone_s - fixed) / size),
        "balance": statistics.mean(spent) / max(spent),
        "repeated": (sum(spent) * size / whole.item() - 1) / (size - 1) if size > 1 else 1.0,
        "bytes": (after[1] - before[1]) // rounds,
        "same_bits": all(map(torch.equal, *weights)),
    }


def _sent(shared: list) -> int:
    return sum(queries.workers.bytes_sent for queries in shared)


def _main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {name: _on_its_way(case) for name, case in cases_of_book("cpu").items()}
    apart = {name: (Step(name, cases), Step(name, cases)) for name in STEPS}  # out of the process group: no sharing
    with joined("cpu"):
        rows = [_row(name, cases, *steps, rounds) for name, steps in apart.items()]
        if rank() == 0:
            print(json.dumps(rows))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
