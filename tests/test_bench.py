"""The benchmark: every method in every mode, the same queries in each, and times that fit together."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from zo_tutorial import bench
from zo_tutorial.__main__ import main
from zo_tutorial.bench.bound import Rates

KEPT = 50  # weights of the first layer


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    masks = {"0.weight": torch.arange(120).view(6, 20) < KEPT, "2.weight": torch.ones(3, 6, dtype=torch.bool)}
    masks |= {"0.bias": torch.zeros(6, dtype=torch.bool), "2.bias": torch.zeros(3, dtype=torch.bool)}
    wide = nn.Sequential(nn.Linear(20, 400), nn.Tanh(), nn.Linear(400, 3))
    batch = torch.randn(16, 20), torch.randint(3, (16,))
    return bench.bench(quick=True, models={"small": (small, masks, batch), "wide": (wide, None, batch)})


def test_there_is_a_row_for_each_model_method_and_mode(rows):
    expected = {("FO", "loop")} | {(m, mode) for m in bench.USUAL for mode in bench.MODES}
    for name in ("small", "wide"):
        assert {(row["method"], row["mode"]) for row in rows if row["model"] == name} == expected
    assert len(rows) == 2 * len(expected)
    assert json.loads(json.dumps(rows)) == rows


def test_all_modes_ask_the_same_queries(rows):
    kept = {"small": KEPT + 18, "wide": 20 * 400 + 400 + 1200 + 3}
    for row in rows:
        d = kept[row["model"]]
        expected = {"FO": 1, "SGD": 41, "low rank": 41, "esti": 1 + 2 * d, "batch": 1 + 2 * d}.get(row["method"])
        if expected is not None:
            assert row["queries"] == expected
        else:
            assert d < row["queries"] <= 1 + 2 * d


def test_a_step_too_long_to_run_whole_is_scaled_and_says_so(rows):
    wide = {(row["method"], row["mode"]): row for row in rows if row["model"] == "wide"}
    assert wide["esti", "loop"]["scaled"]
    assert not wide["SGD", "loop"]["scaled"] and not wide["FO", "loop"]["scaled"]


def test_ratios_follow_from_the_seconds(rows):
    for row in rows:
        mates = {(r["method"], r["mode"]): r for r in rows if r["model"] == row["model"]}
        first_order, loop = mates["FO", "loop"]["median_s"], mates[row["method"], "loop"]["median_s"]
        assert row["first_order_steps"] == pytest.approx(row["median_s"] / first_order)
        assert row["speedup_over_loop"] == pytest.approx(loop / row["median_s"])
        assert row["queries_per_s"] == pytest.approx(row["queries"] / row["median_s"])


def test_no_step_is_faster_than_its_bound(rows):
    assert all(0 < row["bound_s"] < row["median_s"] for row in rows)


def test_the_bound_counts_products_and_exponentials():
    """A net 20-6-3 on 16 samples: 16 (120 + 18) multiply-adds a pass, 48 exponentials and 16 logarithms a loss."""
    net = nn.Sequential(nn.Linear(20, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    case = bench.Case(net, None, (torch.randn(16, 20), torch.arange(16) % 3))
    never = float("inf")
    products = bench.Bound(case, Rates(1.0, never, never, never))
    exponentials = bench.Bound(case, Rates(never, 1.0, never, never))
    passes = 16 * (120 + 18)
    for method, queries, expected in [("FO", 1, 3), ("esti", 277, 3), ("SGD", 41, 41 - 20 * 120 / 138)]:
        assert products.seconds(method, queries) == pytest.approx(expected * passes)
    assert products.seconds("low rank", 41) == pytest.approx(41 * passes - 40 * 16 * 120)
    assert products.seconds("one-sided", 139) == pytest.approx(passes + 120 * 16 * 18)
    assert exponentials.seconds("sign", 100) == 100 * 48
    assert exponentials.seconds("FO", 1) == 48 + 16 * 6  # and tanh
    assert bench.Bound(case, Rates(never, never, 1.0, never)).seconds("sign", 100) == 1600


def test_table_and_chart(rows):
    lines = bench.table(rows).splitlines()
    assert len(lines) == 1 + len(rows) and sum(line.endswith(" scaled") for line in lines) == sum(
        row["scaled"] for row in rows
    )
    figure = Figure()
    bench.plot(rows, figure)
    heights = {round(bar.get_height(), 6) for ax in figure.axes for bars in ax.containers for bar in bars}
    assert heights == {round(row["first_order_steps"], 6) for row in rows if row["method"] != "FO"}


@pytest.mark.parametrize("peer", bench.PEERS)
def test_public_libraries_take_the_same_step(peer):
    pytest.importorskip(peer)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    batch = torch.randn(16, 20), torch.arange(16) % 3
    rows = bench.bench(quick=True, models={"small": (net, None, batch)}, peers=(peer,))
    by_peer = {row["method"]: row["queries"] for row in rows if row["mode"] == peer}
    assert by_peer == {"torchzero": {"SGD": 41, "esti": 1 + 2 * 147}, "evotorch": {"SGD": 40}}[peer]
    bench.plot(rows, Figure())


def test_a_library_that_is_missing_is_named_and_left_out(capsys, tmp_path):
    assert main(["bench", "--quick", "--peers", "--out", str(tmp_path / "nowhere" / "rows.json")]) == 2
    named = {line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")}
    assert named == set(bench.PEERS) - set(bench.installed())


def test_files_that_cannot_be_written_are_refused_before_anything_is_timed(tmp_path, capsys):
    assert main(["bench", "--quick", "--out", str(tmp_path / "nowhere" / "rows.json")]) == 2
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    assert main(["bench", "--quick", "--plot", str(tmp_path / "chart.jpg")]) == 2
    assert ".png" in capsys.readouterr().err.splitlines()[-1]
