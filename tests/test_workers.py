"""Several workers: the same bits as one, and no silence where they drift apart."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import make_net
from several import in_workers
from torch import nn

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.experiments.tasks import JointLoss
from zo_tutorial.models import MNIST_CNN, MNIST_TTM, Encoder
from zo_tutorial.queries import LossQueries, choice
from zo_tutorial.queries.shared import Sharing
from zo_tutorial.workers import Workers

STEPS = 5
ESTI = {"grad_estimator": "esti", "grad_sparsity": 0.3, "h_smooth": 1e-2, "adam": True, "lr": 1e-2}
CASES = {
    "SGD": (ZO_SGD_mask, {"n_sample": 30}),
    "SGD by layers": (ZO_SGD_mask, {"n_sample": 30, "layer_by_layer": True, "two_sided": False}),
    "SGD low rank": (ZO_SGD_mask, {"n_sample": 30, "directions": "low_rank"}),
    "esti": (ZO_SCD_mask, ESTI),
    "one-sided": (ZO_SCD_mask, ESTI | {"STP": False}),
    "batch": (ZO_SCD_mask, ESTI | {"grad_estimator": "batch"}),
    "loop": (ZO_SCD_mask, ESTI | {"query_mode": "loop"}),
    "batched": (ZO_SCD_mask, ESTI | {"query_mode": "batched"}),
}


def joint_loss(outputs, targets):
    return F.cross_entropy(outputs[0], targets[0]) + F.cross_entropy(outputs[1].flatten(0, 1), targets[1].flatten())


def nets():
    """{name: (model, batch, criterion)}"""
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(20, 784, generator=generator), torch.randint(10, (20,), generator=generator)
    small = torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)
    tokens = torch.randint(1, 30, (6, 5), generator=generator)
    tags = torch.randint(4, (6, 5), generator=generator)
    torch.manual_seed(0)
    encoder = Encoder(30, 3, 4, d_model=16, heads=2, d_hidden=16, layers=1, dropout=0.2)
    return {
        "dropout": (make_net("nn.Linear", 0.4), small, F.cross_entropy),
        "tensor": (make_net("TensorizedLinear_module"), small, F.cross_entropy),
        "smooth": (nn.Sequential(nn.Linear(784, 6), nn.GELU(), nn.Linear(6, 10)), (images, labels), F.cross_entropy),
        "TTM": (MNIST_TTM(generator=generator), (images, labels), F.cross_entropy),
        "CNN": (MNIST_CNN(generator=generator), (images, labels), F.cross_entropy),
        "encoder": (encoder, (tokens, (tokens[:, 0] % 3, tags)), joint_loss),
    }


def train(net: str, case: str, steps: int = STEPS) -> tuple:
    """Weights after some steps, losses, the queries that were counted, and the bytes."""
    model, batch, criterion = nets()[net]
    cls, options = CASES[case]
    optimizer = cls(model, criterion, None, generator=torch.Generator().manual_seed(1), **options)
    losses = [optimizer.step(*batch)[1] for _ in range(steps)]
    queries = optimizer.loss_queries
    sent = 0 if queries.workers is None else queries.workers.bytes_sent
    return model.state_dict(), torch.stack(losses), optimizer.queries, sent


SLOW = ("loop", "batched")
SHARED = [(net, case) for net in ("dropout", "encoder") for case in CASES if net == "dropout" or case not in SLOW]
SHARED += [(net, case) for net in ("smooth", "tensor", "TTM", "CNN") for case in ("SGD", "esti")]


def train_all() -> dict:
    """With, of each case, for each step whether it was shared."""
    choice.ENOUGH = 1e-4  # seconds: short units, so that small nets have many
    losses, shared, found = Sharing.losses, list[bool](), {}

    def noted(*args):
        answers = losses(*args)
        shared.append(answers is not None)
        return answers

    Sharing.losses = noted
    for net, case in SHARED:
        found[f"{net} {case}"] = *train(net, case), list(shared)
        shared.clear()
    return found


def same(a, b) -> bool:
    """Whether weights and losses of two runs are equal bit for bit."""
    return torch.equal(a[1], b[1]) and all(torch.equal(a[0][key], b[0][key]) for key in a[0] | b[0])


def test_workers_end_where_one_does_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "ENOUGH", 1e-4)
    monkeypatch.setattr(Sharing, "losses", Sharing.losses)
    alone = train_all()
    for answers in in_workers(3, train_all, tmp_path):
        for net, case in SHARED:
            mine, expected = answers[f"{net} {case}"], alone[f"{net} {case}"]
            assert same(mine, expected), (net, case)
            assert mine[2] == expected[2], (net, case)
            assert any(mine[4]) and not mine[4][0], (net, case)


def send(n: int, d: int) -> int:
    """What a step along n directions sends, all workers together."""
    model = nn.Linear(d - 1, 1)
    optimizer = ZO_SGD_mask(model, F.mse_loss, None, n_sample=n, generator=torch.Generator().manual_seed(1))
    sent = []
    for _ in range(3):
        optimizer.step(torch.ones(4, d - 1), torch.zeros(4, 1))
        sent.append(optimizer.loss_queries.workers.bytes_sent)
    return sent[2] - sent[1]


def disagree(what: str) -> str:
    """Train, and make one thing another on the last worker; the error that it ends in."""
    rank = dist.get_rank()
    odd = rank == dist.get_world_size() - 1
    torch.manual_seed(rank if what == "models" else 0)
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.arange(8) % 3
    x[:, 0] = 0  # so the loss does not see some weights
    seed = 1 + (odd and what == "generators")
    try:
        cls, options = CASES["sign" if what == "sign" else "esti"]
        optimizer = cls(model, F.cross_entropy, None, generator=torch.Generator().manual_seed(seed), **options)
        for step in range(1, 6):
            if what == "a weight" and step == 3 and odd:
                model.weight.data[0, 0] += 1e-7
            if what == "batches" and step == 3 and odd:
                x = x.flip(1)
            if what == "infinite" and step == 3:  # at some coordinates, which one worker may ask alone
                limit = model(x)[0, 0].item()
                optimizer.loss_queries.evaluation.criterion = _Infinite(limit)
            optimizer.step(x, y)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _Infinite:
    def __init__(self, limit: float):
        self.limit = limit

    def __call__(self, outputs, targets):
        return F.cross_entropy(outputs, targets) / (outputs[0, 0] <= self.limit)


CASES["sign"] = (ZO_SCD_mask, {"grad_estimator": "sign"})
APART = "WorkersError: the workers do not agree at step "
ERRORS = {
    "models": f"{APART}1: 'weight' of rank 1 is not that of rank 0",
    "generators": f"{APART}1: the seed of rank 1 is not that of rank 0",
    "a weight": f"{APART}4: 'weight' of rank 1 is not that of rank 0",
    "batches": f"{APART}3: the loss of rank 1 is ",
    "infinite": "FloatingPointError: the loss is inf at step 3, with layer ",
    "sign": "ValueError: grad_estimator 'sign' asks one query after the other, so workers need share='batch'",
}


def by_batch(case: str, share: str = "batch", net: str = "plain") -> tuple:
    """Weights and losses where the batch is shared; the batches have 8 rows, and at last 1."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()
    if net == "batch norm":
        model.append(nn.BatchNorm1d(3).double())
    cls, options = CASES[case]
    optimizer = cls(model, F.cross_entropy, None, generator=generator, share=share, **options)
    losses = []
    for step in range(4):
        rows = 1 if step == 3 else 8
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        losses.append(optimizer.step(x, torch.arange(rows) % 3)[1])
    return model.state_dict(), torch.stack(losses)


def close(a, b) -> bool:
    return torch.allclose(a[1], b[1]) and all(torch.allclose(a[0][key], b[0][key]) for key in a[0])


def joint_in_parts() -> list:
    """The loss of sentences whose words are shared unevenly, as a whole and as workers add it up."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (5, 6), generator=generator)
    tags = torch.randint(4, (5, 6), generator=generator)
    tags[:3, 1:] = -100
    torch.manual_seed(0)
    model, loss = Encoder(30, 3, 4, d_model=16, heads=2, d_hidden=16, layers=1, dropout=0.2), JointLoss()
    queries = LossQueries(model, loss, dict(model.named_parameters()), "auto", 512, Workers.present(), "batch")
    found = queries.start(tokens, (tokens[:, 0] % 3, tags), 7)[1]
    plain = LossQueries(model, joint_loss, dict(model.named_parameters()), "auto", 512, Workers.present(), "batch")
    try:
        plain.start(tokens, (tokens[:, 0] % 3, tags), 7)
    except RuntimeError as error:
        return [found, str(error)]
    return [found, ""]


def test_a_shared_batch_gives_what_one_worker_gets_up_to_rounding(tmp_path):
    alone = {case: by_batch(case) for case in BY_BATCH}
    whole = joint_in_parts()[0]
    answers = in_workers(2, share_batches, tmp_path)
    for case, expected in alone.items():
        assert close(answers[0][case], expected), case
        assert same(answers[0][case], answers[1][case]), case
    for answer in answers:
        found, refusal = answer["joint"]
        assert torch.allclose(found, whole) and torch.equal(found, answers[0]["joint"][0])
        assert "it is no mean over the rows" in refusal
        assert answer["batch norm"].startswith("RuntimeError: share 'batch': the loss of 8 rows is ")


BY_BATCH = ("sign", "esti", "batch", "SGD")


def share_batches() -> dict:
    found: dict = {case: by_batch(case) for case in BY_BATCH} | {"joint": joint_in_parts()}
    try:
        by_batch("sign", net="batch norm")
    except Exception as error:
        found["batch norm"] = f"{type(error).__name__}: {error}"
    return found


def talk() -> tuple:
    """What drifting workers say, and what steps send."""
    torch.manual_seed(0)
    return {what: disagree(what) for what in ERRORS}, [send(10, 100), send(10, 1000), send(40, 100)]


def test_workers_that_drift_apart_all_say_so_and_a_direction_is_8_bytes_whatever_its_size(tmp_path):
    for said, sent in in_workers(2, talk, tmp_path):
        for what, expected in ERRORS.items():
            assert said[what].startswith(expected), said[what]
        beside = 2 * 2 * 4  # from each worker the loss where the parameters stand, and whether all went well
        assert sent == [8 * 10 + beside, 8 * 10 + beside, 8 * 40 + beside]
