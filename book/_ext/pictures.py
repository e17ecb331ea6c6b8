"""The pictures of the start page: `python book/_ext/pictures.py` draws them into `_static`.

`learning.png`: what a network that learns from losses alone answers, as queries go by.
`map.png`: which chapter needs which, as the chapters themselves say it. Both carry what they
show in their metadata, which `tests/test_book.py` compares with the book as it is.
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from zo_tutorial import ZO_SGD_mask
from zo_tutorial.data import mnist
from zo_tutorial.models import MNIST_FC

BOOK = Path(__file__).parent.parent
RIGHT, WRONG = "#0072B2", "#767676"
PARTS = {"#0072B2": range(1, 5), "#009E73": range(5, 10), "#D55E00": range(10, 15)}
COLUMNS = {
    1: 1.22,
    2: 1.22,
    3: 1.22,
    6: 0,
    9: 2.65,
    4: 1.22,
    5: 1.22,
    7: 0,
    12: 2.1,
    8: 0,
    10: 2.65,
    11: 2.65,
    13: 1.22,
    14: 1.22,
}


def learning(looks=(0, 300, 1000, 5000), steps=384):
    """Train on the embedded digits: ten test digits; by queries, the answers to these, and the
    share of all test digits that are right."""
    digits, draws = mnist.load("embedded"), torch.Generator().manual_seed(1)
    net = MNIST_FC(hidden=90, pool=2, generator=draws)
    options = dict(
        n_sample=12,
        two_sided=False,
        baseline="leave_one_out",
        adam=True,
        beta_1=0.95,
        beta_2=0.98,
    )
    optimizer = ZO_SGD_mask(net, cross_entropy, None, 1.55e-2, 1e-3, generator=draws, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels = digits.test
    shown = torch.cat([(labels == digit).nonzero()[0] for digit in range(10)])
    answers, waiting = {}, list(looks)
    for step in range(steps + 1):
        if waiting and (optimizer.queries >= waiting[0] or step == steps):
            waiting.pop(0)
            with torch.no_grad():
                found = net(images).argmax(1)
            answers[optimizer.queries] = (
                found[shown].tolist(),
                (found == labels).double().mean().item(),
            )
        if step < steps:
            batch = torch.randint(len(digits.train.images), (1024,), generator=draws)
            optimizer.step(digits.train.images[batch], digits.train.labels[batch])
            schedule.step()
    return images[shown], answers


def draw_learning(ax, images, answers):
    ax.imshow(
        torch.cat(list(images.view(10, 28, 28)), 1),
        cmap="gray_r",
        extent=(0, 10, 0, 1),
        aspect="auto",
    )
    for row, (queries, (found, share)) in enumerate(answers.items()):
        y = -0.45 - 0.62 * row
        ax.text(-0.15, y, f"{queries:,} queries", ha="right", va="center", fontsize=10)
        ax.text(10.15, y, f"{share:.0%} right", va="center", fontsize=10)
        for digit, answer in enumerate(found):
            look = {"color": RIGHT, "weight": "bold"} if answer == digit else {"color": WRONG}
            ax.text(digit + 0.5, y, answer, ha="center", va="center", fontsize=15, **look)
    ax.set(xlim=(-2.3, 11.8), ylim=(-2.7, 1.05))


def first_cell(file):
    return "".join(json.loads(file.read_text())["cells"][0]["source"])


def needs():
    """{chapter: chapters that it needs}, from the line "You need" of each."""
    found = {}
    for file in sorted(BOOK.glob("[0-9][0-9]_*.ipynb")):
        line = re.search(r"\*\*You need\*\*.*", first_cell(file))[0]
        numbers = {int(number) for number in re.findall(r"\]\((\d\d)_", line)}
        found[int(file.name[:2])] = sorted(numbers)
    return found


def direct(needed):
    """The same without what a needed chapter needs itself."""
    behind = {}
    for chapter, those in sorted(needed.items()):
        behind[chapter] = set(those).union(*(behind[one] for one in those))
    return {chapter: [one for one in those if not any(one in behind[other] for other in those)]
            for chapter, those in needed.items()}  # fmt: skip


def draw_map(ax, needed, titles):
    arrows, depth = direct(needed), {}
    for chapter, those in arrows.items():
        depth[chapter] = 1 + max((depth[one] for one in those), default=-1)
    place = {chapter: (5.2 * COLUMNS[chapter], -depth[chapter]) for chapter in arrows}
    boxes = {}
    for chapter, (x, y) in place.items():
        edge = next(color for color, part in PARTS.items() if chapter in part)
        look = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": edge, "lw": 1.4}
        text = ax.text(
            x,
            y,
            f"{chapter}  {titles[chapter]}",
            ha="center",
            va="center",
            fontsize=9,
            bbox=look,
        )
        boxes[chapter] = text.get_bbox_patch()
    ax.set(xlim=(-2.4, 15.6), ylim=(-8.4, 0.4))
    ax.figure.canvas.draw()  # places the boxes, at which the arrows end
    for chapter, those in arrows.items():
        for one in those:
            ends = {"patchA": boxes[one], "patchB": boxes[chapter], "shrinkA": 1, "shrinkB": 1}
            ax.annotate(
                "",
                place[chapter],
                place[one],
                arrowprops={"arrowstyle": "-|>", "color": "#888888"} | ends,
            )


def titles():
    """{chapter: its title}."""
    found = {}
    for file in sorted(BOOK.glob("[0-9][0-9]_*.ipynb")):
        found[int(file.name[:2])] = first_cell(file).partition("\n")[0].removeprefix("# ")
    return found


def save(file, draw, size, shown, told):
    figure, ax = plt.subplots(figsize=size)
    ax.axis("off")
    draw(ax, *shown)
    figure.savefig(
        BOOK / "_static" / file,
        dpi=150,
        bbox_inches="tight",
        metadata={"Description": json.dumps(told)},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits, answers = learning()
    save("learning.png", draw_learning, (7.2, 3.1), (digits, answers), answers)
    chapters = needs(), titles()
    save("map.png", draw_map, (9.2, 6), chapters, chapters)
