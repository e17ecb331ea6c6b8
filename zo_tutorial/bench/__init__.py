"""What a training step costs: `python -m zo_tutorial bench`.

For each case, method and query mode one step is timed, all of them in turn, again and again; the medians are compared
with a first-order step (forward, backward, Adam) of the same model, with the loop, and with the least that the step's
arithmetic takes on this machine (`bound`). esti, batch and sign skip no coordinate and look to both sides, "one-sided"
is esti that looks to one; SGD takes 20 two-sided directions, Gaussian or, "low rank", of rank 1. Public libraries can
be timed beside them, on the same batch: `pip install 'zo_tutorial[peers]'`, `bench --peers`. `bench --others` times
"auto" on models of other kinds, all of their parameters trained: what its estimate of the work chooses should never be
slower than the loop. Chapter 9 shows the result.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from zo_tutorial.bench.bound import Bound, rates
from zo_tutorial.bench.cases import Case, cases_of_book, other_cases
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.optimizer.base import ZerothOrderOptimizer

COORDINATES = dict(grad_sparsity=0.0, lr=1e-3, h_smooth=1e-3, STP=True)
METHODS: dict[str, tuple[Callable[..., ZerothOrderOptimizer], dict[str, Any]]] = {
    "SGD": (ZO_SGD_mask, dict(lr=1e-3, sigma=1e-3, n_sample=20)),
    "low rank": (ZO_SGD_mask, dict(lr=1e-3, sigma=1e-3, n_sample=20, directions="low_rank")),
    "esti": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="esti")),
    "batch": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="batch")),
    "sign": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="sign")),
    "one-sided": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="esti", STP=False)),
}
USUAL = tuple(method for method in METHODS if method != "one-sided")  # of a case that names none
MODES = ("loop", "batched", "structured")
LOOKS = [("black", ""), ("gray", ""), ("lightgray", ""), ("white", "///"), ("white", "...")]  # of modes, then of peers
REPEATS = 5  # the most times that a step is repeated within a round
PEERS = {"torchzero": ("SGD", "esti"), "evotorch": ("SGD",)}  # what each library has a step for; none has masks


class Step:
    """One training step, always from the same weights, ready to be timed.

    Too long a step is timed on a random sample of the coordinates and scaled by the number of queries.

    Args:
        share: fraction of the coordinates to keep.
    """

    def __init__(self, case: Case, method: str, mode: str, share: float = 1.0):
        self.case, self.method, self.mode, self.share = case, method, mode, share
        model, batch = case.model, case.batch
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.seconds, self.queries = list[float](), 1
        self.optimizer: ZerothOrderOptimizer | None = None
        if method == "FO":
            self.run = _first_order_step(case)
            return
        self.coordinates = sum(parameter.numel() for parameter in model.parameters())
        if mode in PEERS:
            self.run = (_evotorch_step if mode == "evotorch" else _torchzero_step)(model, method, batch)
            self.queries = {"SGD": 40, "esti": 2 * self.coordinates}[method] + (mode == "torchzero")
            return
        cls, options = METHODS[method]
        generator = torch.Generator().manual_seed(0)
        if share < 1:
            trained = sum(map(len, case.kept().values()))
            case = case.thinned(max(1, round(share * trained)), generator)
        options = options | {"parameters": case.parameters(), "generator": generator, "query_mode": mode}
        made = self.optimizer = cls(model, case.criterion, case.masks, **options)
        self.coordinates = sum(map(len, made.index.values()))
        self.run = lambda: made.step(*batch)

    def time(self) -> float:
        """Run one step; return and note its seconds."""
        self.case.model.load_state_dict(self.weights)
        before = self.optimizer.queries if self.optimizer else 0
        start = time.perf_counter()
        self.run()
        if next(self.case.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        if self.optimizer:
            self.queries = self.optimizer.queries - before
        return self.seconds[-1]


def _first_order_step(case: Case) -> Callable:
    optimizer = torch.optim.Adam(case.model.parameters())

    def step():
        optimizer.zero_grad()
        case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
        optimizer.step()

    return step


def _torchzero_step(model, method: str, batch: tuple) -> Callable:
    """Central differences along every coordinate, or along 20 Gaussian directions."""
    import torchzero

    approximations = {
        "esti": lambda: torchzero.m.FDM(h=1e-3, formula="central"),
        "SGD": lambda: torchzero.m.GaussianSmoothing(h=1e-3, n_samples=20, formula="central"),
    }
    optimizer = torchzero.Optimizer(model.parameters(), approximations[method](), torchzero.m.LR(1e-3))

    @torch.no_grad()
    def closure(backward=True):
        return F.cross_entropy(model(batch[0]), batch[1])

    return lambda: optimizer.step(closure)


def _evotorch_step(model, method: str, batch: tuple) -> Callable:
    """Policy gradients with parameter-based exploration: a population of 20 pairs θ ± σ u."""
    from evotorch.algorithms import PGPE
    from evotorch.neuroevolution import SupervisedNE
    from evotorch.tools import set_default_logger_config

    set_default_logger_config(logger_level=30, override=True)  # warnings only
    data, device = torch.utils.data.TensorDataset(*batch), batch[0].device
    problem = SupervisedNE(data, model, F.cross_entropy, minibatch_size=len(batch[0]), device=device)
    options = dict(popsize=40, center_learning_rate=1e-3, stdev_learning_rate=0.0, stdev_init=1e-3)
    return PGPE(problem, **options).step


def bench(
    quick: bool = False,
    device: str = "cpu",
    models: dict | None = None,
    peers: tuple[str, ...] = (),
    others: bool = False,
) -> list[dict]:
    """Time a step of every model, method and mode on one device, with as many threads as torch is set to.

    Args:
        quick: fewer rounds, and more steps scaled from a sample: about a minute.
        models: {name: Case, or the first of its fields} on that device; None: those of the book.
        peers: the libraries of `PEERS` to time too, on models without masks.
        others: models of other kinds, in the modes "loop" and "auto".

    Returns:
        Rows with `model, method, mode, device, threads, queries, median_s, first_order_steps, speedup_over_loop,
        queries_per_s, bound_s, scaled`: seconds of a whole step, those over the seconds of a first-order step, the
        seconds of the loop over those, the bound in seconds (None for peers), and whether they were scaled from a
        sample. A first-order step counts as one query.
    """
    rounds, longest = (3, 0.12) if quick else (7, 1.0)  # rounds, seconds of a step
    rows, measured = [], rates(device)
    models = models or (other_cases(device) if others else cases_of_book(device))
    bar = tqdm(total=len(models) * (1 + rounds), unit="round", desc=device, leave=False, delay=1)
    for name, given in models.items():
        case = Case(*given)
        trained = sum(map(len, case.kept().values()))
        modes = ("loop", "auto") if others else MODES
        kinds = [("FO", "loop")] + [(method, mode) for method in case.methods or USUAL for mode in modes]
        kinds += [
            (method, peer) for peer in peers if case.masks is None and case.methods is None for method in PEERS[peer]
        ]
        steps = []
        for method, mode in kinds:
            whole = mode in PEERS or method in ("FO", "SGD", "low rank")
            step = Step(case, method, mode, 1.0 if whole else min(1.0, 64 / trained))
            step.time()  # the first one also compares with the loop
            enough = (8 if mode == "structured" else 1) * longest / 4
            while step.share < 1 and min(step.time(), step.time()) < enough:
                step = Step(case, method, mode, min(1.0, 4 * step.share))
                step.time()
            step.seconds.clear()
            steps.append(step)
        bar.update()
        for _ in range(rounds):
            for step in steps:
                step.time()
                # short steps several times in a row, as in training
                for _ in range(min(REPEATS, int(longest / 4 / step.seconds[-1]))):
                    step.time()
            bar.update()
        rows += _rows(name, steps, device, trained, Bound(case, measured))
    bar.close()
    return rows


def installed() -> tuple[str, ...]:
    """The libraries of `PEERS` that can be imported."""
    return tuple(peer for peer in PEERS if importlib.util.find_spec(peer))


def _rows(name: str, steps: list[Step], device: str, trained: int, bound: Bound) -> list[dict]:
    """The rows of one model."""
    whole = {}  # seconds and queries of a whole step
    for step in steps:
        queries, seconds = step.queries, statistics.median(step.seconds)
        if step.share < 1:
            queries = 1 + round((queries - 1) * trained / step.coordinates)
            seconds *= queries / step.queries
        whole[step.method, step.mode] = seconds, queries
    first_order = whole["FO", "loop"][0]
    return [
        {
            "model": name,
            "method": step.method,
            "mode": step.mode,
            "device": device,
            "threads": torch.get_num_threads(),
            "queries": (found := whole[step.method, step.mode])[1],
            "median_s": found[0],
            "first_order_steps": found[0] / first_order,
            "speedup_over_loop": whole[step.method, "loop"][0] / found[0],
            "queries_per_s": found[1] / found[0],
            "bound_s": None if step.mode in PEERS else bound.seconds(step.method, found[1]),
            "scaled": step.share < 1,
        }
        for step in steps
    ]


def table(rows: list[dict]) -> str:
    """The rows as text, one a line."""
    names = f"{'device':6} {'model':11} {'method':8} {'mode':10}"
    lines = [f"{names} {'queries':>8} {'ms':>10} {'FO steps':>9} {'x loop':>7} {'queries/s':>10} {'x bound':>8}"]
    for row in rows:
        bound = f"{row['median_s'] / row['bound_s']:.1f}" if row["bound_s"] else ""
        lines.append(
            f"{row['device']:6} {row['model']:11} {row['method']:8} {row['mode']:10} {row['queries']:8,} "
            f"{1e3 * row['median_s']:10.2f} {row['first_order_steps']:9.1f} {row['speedup_over_loop']:7.1f} "
            f"{row['queries_per_s']:10,.0f} {bound:>8}" + (" scaled" if row["scaled"] else "")
        )
    return "\n".join(lines)


def plot(rows: list[dict], figure) -> None:
    """A bar chart of first-order steps a step, one panel for each device and model, drawn on a matplotlib Figure."""
    panels = list(dict.fromkeys((row["device"], row["model"]) for row in rows))
    methods = list(METHODS)
    modes = [mode for mode in (*MODES, "auto", *PEERS) if any(row["mode"] == mode for row in rows)]
    width = 0.8 / len(modes)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for k, (mode, (color, hatch)) in enumerate(zip(modes, LOOKS, strict=False)):
            chosen = [row for row in rows if (row["device"], row["model"]) == panel and row["mode"] == mode]
            times = {row["method"]: row["first_order_steps"] for row in chosen if row["method"] != "FO"}
            places = [methods.index(method) + width * (k - (len(modes) - 1) / 2) for method in times]
            ax.bar(places, list(times.values()), width, label=mode, color=color, hatch=hatch, edgecolor="black")
        title = panel[1] if len({device for device, _ in panels}) == 1 else f"{panel[1]}, {panel[0]}"
        ax.set(title=title, yscale="log", xticks=range(len(methods)), xticklabels=methods, ylim=(1, None))
    axes[0].set_ylabel("time of a step (first-order steps)")
    labels = [ax.get_legend_handles_labels() for ax in axes]
    figure.legend(*max(labels, key=lambda found: len(found[1])), loc="outside lower center", ncols=len(modes))
