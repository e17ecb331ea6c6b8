"""The figure style, the method looks, and `explore` in all the places that show it."""

import base64
import html
import io
import json
import subprocess
import sys
from importlib import resources

import matplotlib
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image, ImageChops

from zo_tutorial import viz

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
WIDGET = "application/vnd.jupyter.widget-view+json"
CURVE = [
    {"epoch": 0, "queries": 0, "seconds": 0.0, "val_accuracy": 0.1},
    {"epoch": 1, "queries": 100, "seconds": 1.0, "val_accuracy": 0.9},
    {"epoch": 2, "queries": 200, "seconds": 2.0, "val_accuracy": 0.8},
]


def draw(ax, height, color):
    ax.bar([0], [height], color=color)
    ax.set(xlabel="place", ylabel="height", ylim=(0, 5))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def state_of(explorer):
    """What the script in the page reads."""
    page = explorer._repr_mimebundle_()["text/html"]
    return json.loads(html.unescape(page.split('data-state="')[1].split('"')[0]))


# Style and methods


def test_methods_differ_in_colour_in_line_and_in_marker():
    for key in ("label", "color", "linestyle", "marker"):
        assert len({look[key] for look in viz.METHODS.values()}) == len(viz.METHODS), key
    assert {look["color"] for look in viz.METHODS.values()} <= OKABE_ITO


def test_every_config_has_a_look():
    configs = [path.name for path in (resources.files("zo_tutorial") / "configs").rglob("*.yml")]
    assert configs
    for name in configs:
        assert viz._method(name.removesuffix(".yml")) in viz.METHODS


def test_style_sets_the_palette_and_the_size():
    with matplotlib.rc_context():
        viz.use_style()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert cycle == [look["color"] for method, look in viz.METHODS.items() if method != "FO"]
        assert matplotlib.rcParams["figure.facecolor"] == "white"  # opaque, so that it reads in a dark theme


def test_curves_are_drawn_in_the_look_of_their_method():
    ax = viz.plot_curves([{"name": "MNIST/TTM/rank6_SCD_esti", "curve": CURVE}, {"name": "SGD", "curve": CURVE}])
    esti, sgd = ax.get_lines()
    assert esti.get_color() == viz.METHODS["SCD_esti"]["color"] and sgd.get_color() == viz.METHODS["SGD"]["color"]
    assert list(esti.get_xdata()) == [0, 100, 200] and list(esti.get_ydata()) == [0.1, 0.9, 0.8]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "loss queries"
    ax = viz.plot_curves([{"name": "SGD", "curve": CURVE}], x="seconds", ax=plt.figure().gca())
    assert ax.get_xscale() == "linear" and ax.get_xlabel() == "seconds"


def test_first_order_is_a_dashed_ceiling_at_its_last_value():
    (line,) = viz.plot_curves([{"name": "MNIST/FC/FO", "curve": CURVE}]).get_lines()
    assert set(line.get_ydata()) == {0.8} and line.get_linestyle() == "--"


def test_seeds_of_a_method_share_one_line_in_the_legend():
    ax = viz.plot_curves([{"name": "SGD", "curve": CURVE}] * 3)
    assert len(ax.get_lines()) == 3 and len(ax.get_legend().get_texts()) == 1


def test_a_method_of_the_users_own_is_drawn_under_its_name():
    ax = viz.plot_curves([{"name": "MNIST/FC/Newton", "curve": CURVE}])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MNIST/FC/Newton"]


# explore: the frames


def test_frames_stand_in_the_order_that_the_script_counts_in():
    seen = []
    explorer = viz.explore(lambda ax, a, b, c: seen.append((a, b, c)), a=[1, 2], b=[1, 2, 3], c=[1, 2])
    assert len(explorer.frames) == 12
    for i in range(2):
        for j in range(3):
            for k in range(2):
                assert seen[(i * 3 + j) * 2 + k] == (i + 1, j + 1, k + 1)


def test_bundle_offers_html_a_picture_and_text():
    explorer = viz.explore(draw, height=[1.0, 2.5], color=["red", "blue"])
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "image/png"}  # no front end here, so no widget
    assert bundle["text/plain"] == "explore(height=['1', '2.5'], color=['red', 'blue'])"
    state = state_of(explorer)
    assert state["texts"] == [["1", "2.5"], ["red", "blue"]]
    assert len(set(state["pngs"])) == 4 and state["pngs"][0] == bundle["image/png"]
    for png in state["pngs"]:
        raw = base64.b64decode(png)
        assert Image.open(io.BytesIO(raw)).size == (928, 576) and len(raw) < 30_000


def heat(ax, share):
    """A map of few very different colours: most of the picture is white, so a small palette has none to spare."""
    ax.imshow([[-1, -0.9, 0.05], [share, 0.4, 0.9]], cmap="RdBu", vmin=-1, vmax=1)
    ax.set(xlim=(-20, 22), title="a map")


def mesh(ax, share):
    ax.pcolormesh([[0, 1, 2], [3, 4, 5 + share]], cmap="cividis")


def dots(ax, share):
    ax.scatter(range(40), range(40), c=range(40), s=60, cmap="viridis")


def photograph(ax, share):
    ax.imshow([[(i / 40, j / 40, (i * j) % 41 / 41) for i in range(40)] for j in range(40)])


@pytest.mark.parametrize("draw_map", [heat, mesh, dots, photograph])
def test_a_colour_map_keeps_its_colours(draw_map, monkeypatch):
    drawn = []
    keep = viz._in_few_colours
    monkeypatch.setattr(viz, "_in_few_colours", lambda picture, exact: drawn.append(picture) or keep(picture, exact))
    explorer = viz.explore(draw_map, share=[0.2])
    raw = base64.b64decode(explorer.frames[0][0])
    kept = Image.open(io.BytesIO(raw)).convert("RGB")
    assert max(high for _, high in ImageChops.difference(drawn[0], kept).getextrema()) <= 4
    assert len(raw) < 60_000


def test_lines_and_text_make_do_with_a_small_palette():
    raw = base64.b64decode(viz.explore(draw, height=[1], color=["red"]).frames[0][0])
    assert len(Image.open(io.BytesIO(raw)).getcolors()) <= 64


def test_html_needs_no_network_and_clashes_with_no_neighbour():
    page = viz.explore(draw, height=[1, 2], color=["red"])._html()
    assert "http" not in page and " id=" not in page
    assert page.count("<input") == page.count("aria-label=") - 1 == page.count("<label") == 2


def test_two_runs_give_the_same_bytes():
    bundles = [viz.explore(draw, height=[1, 2], color=["red"])._repr_mimebundle_() for _ in range(2)]
    assert bundles[0] == bundles[1]


def test_each_frame_has_its_alternative_text():
    assert state_of(viz.explore(draw, height=[1, 2], color=["red"]))["alts"] == [
        "A figure: height against place, for height = 1, color = red.",
        "A figure: height against place, for height = 2, color = red.",
    ]
    explorer = viz.explore(lambda ax, n: f'{n} bars, "none" < {n + 1}', n=[3])
    assert state_of(explorer)["alts"] == ['3 bars, "none" < 4']
    assert 'alt="3 bars, &quot;none&quot; &lt; 4"' in explorer._html()


def test_frames_have_the_style_of_the_book_and_leave_the_process_as_it_was():
    sizes = []
    before = dict(matplotlib.rcParams)
    viz.explore(lambda ax, n: sizes.append(matplotlib.rcParams["font.size"]), n=[1])
    assert sizes == [11] and dict(matplotlib.rcParams) == before and not plt.get_fignums()


# explore: errors


def test_an_error_in_draw_passes_through():
    def broken(ax, n):
        if n == 2:
            raise ZeroDivisionError("in draw")

    with pytest.raises(ZeroDivisionError, match="in draw"):
        viz.explore(broken, n=[1, 2])


@pytest.mark.parametrize(
    "grid, message",
    [
        ({}, "1 to 3 parameters, not 0"),
        ({"a": [1], "b": [1], "c": [1], "d": [1]}, "1 to 3 parameters, not 4: a, b, c, d"),
        ({"a": [1, 2], "b": []}, "'b' has no values"),
        ({"a": range(10), "b": range(10)}, "10 a × 10 b makes 100 frames, at most 60"),
    ],
)
def test_impossible_grids_are_errors(grid, message):
    with pytest.raises(ValueError, match=message):
        viz.explore(draw, **grid)


# explore: alive


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, metadata):
    """Run a cell as a front end does -> its display data and the messages of its widgets."""
    request = {"code": code, "silent": False, "store_history": True}
    message = client.session.msg("execute_request", request, metadata=metadata)
    client.shell_channel.send(message)
    return messages_until_idle(client, message)


def messages_until_idle(client, request):
    messages = []
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != request["header"]["msg_id"]:
            continue
        if message["msg_type"] == "error":
            raise AssertionError("\n".join(message["content"]["traceback"]))
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return messages
        messages.append(message)


CELL = """
from zo_tutorial.viz import explore
factor = 1
def draw(ax, n):
    ax.bar([0], [factor / (3 - n)])
    return f"{factor} / {3 - n}"
explore(draw, n=[1, 2])
"""


def bundle_of(messages):
    return next(message["content"]["data"] for message in messages if message["msg_type"] == "execute_result")


def test_a_build_gets_no_widget(kernel):
    messages = execute(kernel, CELL, {})
    assert WIDGET not in bundle_of(messages) and not [m for m in messages if m["msg_type"] == "comm_open"]


def test_a_front_end_gets_sliders_that_draw_anew_and_show_errors(kernel):
    messages = execute(kernel, CELL, {"cellId": "a-cell"})
    assert {WIDGET, "text/html", "image/png"} <= set(bundle_of(messages))
    opened = {
        m["content"]["data"]["state"]["_model_name"]: m["content"] for m in messages if m["msg_type"] == "comm_open"
    }
    slider, picture = opened["SelectionSliderModel"], opened["HTMLModel"]
    assert slider["data"]["state"]["_options_labels"] == ["1", "2"]
    assert 'alt="1 / 2"' in picture["data"]["state"]["value"]

    def move(index):
        content = {"comm_id": slider["comm_id"], "data": {"method": "update", "state": {"index": index}}}
        message = kernel.session.msg("comm_msg", content)
        kernel.shell_channel.send(message)
        updates = [m["content"] for m in messages_until_idle(kernel, message) if m["msg_type"] == "comm_msg"]
        return next(u["data"]["state"]["value"] for u in updates if u["comm_id"] == picture["comm_id"])

    execute(kernel, "factor = 6", {"cellId": "another"})
    assert 'alt="6 / 1"' in move(1)  # drawn now, with what the notebook holds now
    execute(kernel, "factor = None", {"cellId": "another"})
    assert "TypeError" in move(0)


def test_import_stays_light():
    code = "import sys, zo_tutorial; print([m for m in ('matplotlib', 'ipywidgets', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


ARRAYS = """
import numpy as np, torch
from zo_tutorial.viz import explore
def draw(ax, line, tensor, thing):
    ax.plot(line)
    return f"{line[0]:g} / {tensor.tolist()} / {thing}"
lines = np.arange(6.0).reshape(3, 2)
explore(draw, line=lines, tensor=[torch.zeros(2), torch.ones(2)], thing=[{}, [], {1: []}])
"""


def test_values_may_be_arrays_or_anything_else(kernel):
    messages = execute(kernel, ARRAYS, {"cellId": "arrays"})
    assert {WIDGET, "text/html"} <= set(bundle_of(messages))
    states = [m["content"] for m in messages if m["msg_type"] == "comm_open"]
    sliders = [one for one in states if one["data"]["state"]["_model_name"] == "SelectionSliderModel"]
    picture = next(one for one in states if one["data"]["state"]["_model_name"] == "HTMLModel")
    assert 'alt="0 / [0.0, 0.0] / {}"' in picture["data"]["state"]["value"]
    alts = ("4 / [0.0, 0.0] / {}", "4 / [1.0, 1.0] / {}", "4 / [1.0, 1.0] / {1: []}")
    for slider, index, alt in zip(sliders, (2, 1, 2), alts, strict=True):
        content = {"comm_id": slider["comm_id"], "data": {"method": "update", "state": {"index": index}}}
        message = kernel.session.msg("comm_msg", content)
        kernel.shell_channel.send(message)
        updates = [m["content"] for m in messages_until_idle(kernel, message) if m["msg_type"] == "comm_msg"]
        shown = next(u["data"]["state"]["value"] for u in updates if u["comm_id"] == picture["comm_id"])
        assert f'alt="{alt}"' in shown
