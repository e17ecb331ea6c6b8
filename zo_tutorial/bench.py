"""What a training step costs: `python -m zo_tutorial bench`.

For each model, method and query mode one step is timed, all of them in turn, again and again; the medians are compared
with a first-order step (forward, backward, Adam) of the same model and with the loop. esti, batch and sign skip no
coordinate and look to both sides; SGD takes 20 two-sided directions, Gaussian or, "low rank", of rank 1. Public
libraries can be timed beside them, on the same batch: `pip install 'zo_tutorial[peers]'`, `bench --peers`.
`bench --others` times "auto" on models of other kinds, all of their parameters trained: what its estimate of the work
chooses should never be slower than the loop. Chapter 9 shows the result.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from zo_tutorial.data import mnist
from zo_tutorial.models import MNIST_CNN, MNIST_FC, MNIST_TTM, Encoder
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.optimizer.base import ZerothOrderOptimizer
from zo_tutorial.pruning import apply_masks, grasp
from zo_tutorial.selection import chosen_positions, kept_positions, select_parameters

BATCH = 128
COORDINATES = dict(grad_sparsity=0.0, lr=1e-3, h_smooth=1e-3, STP=True)
METHODS: dict[str, tuple[Callable[..., ZerothOrderOptimizer], dict[str, Any]]] = {
    "SGD": (ZO_SGD_mask, dict(lr=1e-3, sigma=1e-3, n_sample=20)),
    "low rank": (ZO_SGD_mask, dict(lr=1e-3, sigma=1e-3, n_sample=20, directions="low_rank")),
    "esti": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="esti")),
    "batch": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="batch")),
    "sign": (ZO_SCD_mask, COORDINATES | dict(grad_estimator="sign")),
}
MODES = ("loop", "batched", "structured")
LOOKS = [("black", ""), ("gray", ""), ("lightgray", ""), ("white", "///"), ("white", "...")]  # of modes, then of peers
REPEATS = 5  # the most times that a step is repeated within a round
PEERS = {"torchzero": ("SGD", "esti"), "evotorch": ("SGD",)}  # what each library has a step for; none has masks


class Step:
    """One training step, always from the same weights, ready to be timed.

    Too long a step is timed on a random sample of the coordinates and scaled by the number of queries.

    Args:
        share: fraction of the coordinates to keep.
        everything: train all parameters, not only those of the supported layers.
    """

    def __init__(self, model, masks, method: str, mode: str, batch: tuple, share: float = 1.0, everything=False):
        self.model, self.method, self.mode, self.batch = model, method, mode, batch
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.seconds, self.queries, self.share = list[float](), 1, share
        self.optimizer: ZerothOrderOptimizer | None = None
        if method == "FO":
            self.run = _first_order_step(model, batch)
            return
        self.coordinates = sum(parameter.numel() for parameter in model.parameters())
        if mode in PEERS:
            self.run = (_evotorch_step if mode == "evotorch" else _torchzero_step)(model, method, batch)
            self.queries = {"SGD": 40, "esti": 2 * self.coordinates}[method] + (mode == "torchzero")
            return
        cls, options = METHODS[method]
        generator = torch.Generator().manual_seed(0)
        chosen = list(model.parameters()) if everything else None
        if share < 1:
            masks = _thinned(model, masks, share, generator, chosen)
        options = options | {"parameters": chosen, "generator": generator, "query_mode": mode}
        made = self.optimizer = cls(model, F.cross_entropy, masks, **options)
        self.coordinates = sum(map(len, made.index.values()))
        self.run = lambda: made.step(*batch)

    def time(self) -> float:
        """Run one step; return and note its seconds."""
        self.model.load_state_dict(self.weights)
        before = self.optimizer.queries if self.optimizer else 0
        start = time.perf_counter()
        self.run()
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        if self.optimizer:
            self.queries = self.optimizer.queries - before
        return self.seconds[-1]


def _first_order_step(model, batch: tuple) -> Callable:
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
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
        quick: fewer rounds, and more steps scaled from a sample: under a minute on two cores.
        models: {name: (model, masks, (inputs, targets))} on that device; None: the models of the book on real images.
        peers: the libraries of `PEERS` to time too, on models without masks.
        others: the models of `others_of`, with all parameters trained, by directions and by esti in the modes
            "loop" and "auto".

    Returns:
        Rows with `model, method, mode, device, threads, queries, median_s, first_order_steps, speedup_over_loop,
        queries_per_s, scaled`: seconds of a whole step, those over the seconds of a first-order step, the seconds
        of the loop over those, and whether they were scaled from a sample. A first-order step counts as one query.
    """
    rounds, longest = (3, 0.12) if quick else (7, 1.0)  # rounds, seconds of a step
    rows = []
    models = models or (others_of(device) if others else _models(device))
    bar = tqdm(total=len(models) * (1 + rounds), unit="round", desc=device, leave=False, delay=1)
    for name, (model, masks, batch) in models.items():
        trained = sum(map(len, _kept(model, masks, list(model.parameters()) if others else None).values()))
        kinds = [("FO", "loop")] + [(method, mode) for method in METHODS for mode in MODES]
        if others:
            methods = ("SGD", "low rank", "esti")
            kinds = [("FO", "loop")] + [(method, mode) for method in methods for mode in ("loop", "auto")]
        kinds += [(method, peer) for peer in peers if masks is None for method in PEERS[peer]]
        steps = []
        for method, mode in kinds:
            whole = mode in PEERS or method in ("FO", "SGD", "low rank")
            step = Step(model, masks, method, mode, batch, 1.0 if whole else min(1.0, 64 / trained), others)
            step.time()  # the first one also compares with the loop
            enough = (8 if mode == "structured" else 1) * longest / 4
            while step.share < 1 and min(step.time(), step.time()) < enough:
                step = Step(model, masks, method, mode, batch, min(1.0, 4 * step.share), others)
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
        rows += _rows(name, steps, device, trained)
    bar.close()
    return rows


def installed() -> tuple[str, ...]:
    """The libraries of `PEERS` that can be imported."""
    return tuple(peer for peer in PEERS if importlib.util.find_spec(peer))


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


def others_of(device: str) -> dict:
    """Models of other kinds on random inputs: {name: (model, None, batch)}. Two of them come from torchvision.

    "encoder" is that of chapter 11 at full size, dense, its embeddings included: 15 million weights, 8 sentences.
    """
    import torchvision

    class Sequence(nn.Module):
        """A layer over a sequence (B, L, 64), and a linear layer on what it makes of it."""

        def __init__(self, layer):
            super().__init__()
            self.embed, self.layer, self.head = nn.Linear(16, 64), layer, nn.Linear(64, 10)

        def forward(self, x):
            h = self.layer(self.embed(x))
            return self.head((h[0] if isinstance(h, tuple) else h).mean(1))

    class Intents(nn.Module):
        """The encoder, without its tags."""

        def __init__(self):
            super().__init__()
            self.encoder = Encoder(725, 26, 120, d_model=768, heads=12, d_hidden=3072)

        def forward(self, tokens):
            return self.encoder(tokens)[0]

    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    models = {
        "resnet18": torchvision.models.resnet18(num_classes=10),
        "mobilenet": torchvision.models.mobilenet_v3_small(num_classes=10),
        "transformer": Sequence(nn.TransformerEncoder(block, 2, enable_nested_tensor=False)),
        "LSTM": Sequence(nn.LSTM(64, 64, batch_first=True)),
        "encoder": Intents(),
    }
    images, words, tokens = torch.randn(8, 3, 64, 64), torch.randn(32, 20, 16), torch.randint(1, 725, (8, 16))
    batches = [(x, torch.randint(10, (len(x),))) for x in (images, images, words, words, tokens)]
    return {
        name: (model.to(device), None, tuple(part.to(device) for part in batch))
        for (name, model), batch in zip(models.items(), batches, strict=True)
    }


def _kept(model, masks, chosen: list | None = None) -> dict:
    """The trained positions of each parameter."""
    return kept_positions(select_parameters(model, parameters=chosen).trained, masks)


def _thinned(model, masks, share: float, generator: torch.Generator, chosen: list | None) -> dict:
    """Masks that keep a random share of what `masks` keep."""
    index = _kept(model, masks, chosen)
    sizes = [len(positions) for positions in index.values()]
    sample = torch.zeros(sum(sizes), dtype=torch.bool)
    sample[torch.randperm(len(sample), generator=generator)[: max(1, round(share * len(sample)))]] = True
    thinned = {}
    for (name, positions), kept in zip(index.items(), sample.split(sizes), strict=True):
        thinned[name] = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        thinned[name].view(-1)[chosen_positions(positions, kept).cpu()] = True
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
            "threads": torch.get_num_threads(),
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
    names = f"{'device':6} {'model':11} {'method':8} {'mode':10}"
    lines = [f"{names} {'queries':>8} {'ms':>10} {'FO steps':>9} {'x loop':>7} {'queries/s':>10}"]
    for row in rows:
        lines.append(
            f"{row['device']:6} {row['model']:11} {row['method']:8} {row['mode']:10} {row['queries']:8,} "
            f"{1e3 * row['median_s']:10.2f} {row['first_order_steps']:9.1f} {row['speedup_over_loop']:7.1f} "
            f"{row['queries_per_s']:10,.0f}" + (" scaled" if row["scaled"] else "")
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
