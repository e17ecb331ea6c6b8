"""What a training step costs: `python -m zo_tutorial bench`.

For each model, method and query mode one step is timed, all of them in turn, again and again; the medians are compared
with a first-order step (forward, backward, Adam) of the same model and with the loop. esti, batch and sign skip no
coordinate and look to both sides; SGD takes 20 two-sided directions. Chapter 9 shows the result.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from zo_tutorial import viz
from zo_tutorial.data import mnist
from zo_tutorial.models import MNIST_CNN, MNIST_FC, MNIST_TTM
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.pruning import apply_masks, grasp
from zo_tutorial.selection import kept_positions, select_parameters

BATCH = 128
COORDINATES = dict(grad_sparsity=0.0, lr=1e-3, h_smooth=1e-3, STP=True)
METHODS = {
    "FO": None,
    "SGD": (ZO_SGD_mask, dict(lr=1e-3, sigma=1e-3, n_sample=20)),
    "esti": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="esti")),
    "batch": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="batch")),
    "sign": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="sign")),
}
MODES = ("loop", "batched", "structured")


class Step:
    """One training step, always from the same weights, ready to be timed.

    Too long a step is timed on a random sample of the coordinates and scaled by the number of queries.

    Args:
        share: fraction of the coordinates to keep.
    """

    def __init__(self, model, masks, method: str, mode: str, batch: tuple, share: float = 1.0):
        self.model, self.method, self.mode, self.batch = model, method, mode, batch
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.seconds, self.queries, self.share = [], 1, share
        if method == "FO":
            self.optimizer = torch.optim.Adam(model.parameters())
            return
        cls, options = METHODS[method]
        generator = torch.Generator().manual_seed(0)
        if share < 1:
            masks = _thinned(model, masks, share, generator)
        self.optimizer = cls(model, F.cross_entropy, masks, **options, generator=generator, query_mode=mode)
        self.coordinates = sum(map(len, self.optimizer.index.values()))

    def time(self) -> float:
        """Run one step; return and note its seconds."""
        self.model.load_state_dict(self.weights)
        before = 0 if self.method == "FO" else self.optimizer.queries
        start = time.perf_counter()
        if self.method == "FO":
            inputs, targets = self.batch
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()
            self.optimizer.step()
        else:
            self.optimizer.step(*self.batch)
            self.queries = self.optimizer.queries - before
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        return self.seconds[-1]


def bench(quick: bool = False, device: str = "cpu", models: dict | None = None) -> list[dict]:
    """Time a step of every model, method and mode on one device, with as many threads as torch is set to.

    Args:
        quick: fewer rounds, and more steps scaled from a sample: under a minute on two cores.
        models: {name: (model, masks, (inputs, targets))} on that device; None: the models of the book on real images.

    Returns:
        Rows with `model, method, mode, device, queries, median_s, first_order_steps, speedup_over_loop, queries_per_s,
        scaled`: seconds of a whole step, those over the seconds of a first-order step, the loop's seconds over those,
        and whether they were scaled from a sample. A first-order step counts as one query in a loop.
    """
    rounds, longest = (3, 0.12) if quick else (7, 1.0)  # rounds, seconds of a step
    rows = []
    for name, (model, masks, batch) in (models or _models(device)).items():
        trained = sum(map(len, _kept(model, masks).values()))
        steps = []
        for method in METHODS:
            for mode in MODES[:1] if method == "FO" else MODES:
                step = Step(model, masks, method, mode, batch, 1.0 if method in ("FO", "SGD") else 16 / trained)
                step.time()  # the first one also compares with the loop
                enough = (8 if mode == "structured" else 1) * longest / 4
                while step.share < 1 and min(step.time(), step.time()) < enough:
                    step = Step(model, masks, method, mode, batch, min(1.0, 4 * step.share))
                    step.time()
                step.seconds.clear()
                steps.append(step)
        for _ in range(rounds):
            for step in steps:
                step.time()
        rows += _rows(name, steps, device, trained)
    return rows


def _models(device) -> dict:
    """{name: (model, masks, batch)}; the weights come from a seed, the batch is real."""
    generator = torch.Generator().manual_seed(0)
    split = mnist.load("embedded").train
    balanced = mnist.class_balanced(split, 25, generator)
    images, labels = split.images[:BATCH].to(device), split.labels[:BATCH].to(device)
    dense = MNIST_FC(generator=generator).to(device)
    masks = grasp(dense, F.cross_entropy, balanced.images.to(device), balanced.labels.to(device), 0.95)
    apply_masks(dense, masks)
    return {
        "FC": (dense, masks, (images, labels)),
        "TTM": (MNIST_TTM(generator=generator).to(device), None, (images, labels)),
        "CNN": (MNIST_CNN(generator=generator).to(device), None, (images, labels)),
    }


def _kept(model, masks) -> dict:
    """The trained positions of each parameter."""
    trained, _ = select_parameters(model, [])
    return kept_positions(model, trained, masks)


def _thinned(model, masks, share: float, generator: torch.Generator) -> dict:
    """Masks that keep a random share of what `masks` keep."""
    index = _kept(model, masks)
    sizes = [len(positions) for positions in index.values()]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[: max(1, round(share * len(chosen)))]] = True
    thinned = {}
    for (name, positions), kept in zip(index.items(), chosen.split(sizes), strict=True):
        thinned[name] = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        thinned[name].view(-1)[positions.cpu()[kept]] = True
    return thinned


def _rows(name: str, steps: list[Step], device: str, trained: int) -> list[dict]:
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
            "queries": (found := whole[step.method, step.mode])[1],
            "median_s": found[0],
            "first_order_steps": found[0] / first_order,
            "speedup_over_loop": whole[step.method, "loop"][0] / found[0],
            "queries_per_s": found[1] / found[0],
            "scaled": step.share < 1,
        }
        for step in steps
    ]


def table(rows: list[dict]) -> str:
    """The rows as text, one a line."""
    names = f"{'device':6} {'model':5} {'method':6} {'mode':10}"
    lines = [f"{names} {'queries':>8} {'ms':>10} {'FO steps':>9} {'x loop':>7} {'queries/s':>10}"]
    for row in rows:
        lines.append(
            f"{row['device']:6} {row['model']:5} {row['method']:6} {row['mode']:10} {row['queries']:8,} "
            f"{1e3 * row['median_s']:10.2f} {row['first_order_steps']:9.1f} {row['speedup_over_loop']:7.1f} "
            f"{row['queries_per_s']:10,.0f}" + (" scaled" if row["scaled"] else "")
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """A bar chart of first-order steps a step, one panel a model, written to a file."""
    from matplotlib.figure import Figure

    viz.use_style()
    panels = list(dict.fromkeys((row["device"], row["model"]) for row in rows))
    methods = [method for method in METHODS if method != "FO"]
    figure = Figure(figsize=(2.9 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (device, model) in zip(axes, panels, strict=True):
        for k, (mode, hatch) in enumerate(zip(MODES, ("", "//", ".."), strict=True)):
            chosen = [row for row in rows if (row["device"], row["model"], row["mode"]) == (device, model, mode)]
            times = {row["method"]: row["first_order_steps"] for row in chosen}
            places = [i + 0.27 * (k - 1) for i in range(len(methods))]
            ax.bar(places, [times[method] for method in methods], 0.25, label=mode, hatch=hatch, edgecolor="white")
        ax.set(title=f"{model}, {device}", yscale="log", xticks=range(len(methods)), xticklabels=methods)
    axes[0].set_ylabel("time of a step (first-order steps)")
    axes[-1].legend()
    figure.savefig(path, metadata={"Software": None})
