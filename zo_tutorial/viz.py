"""One figure style for the whole book, one look per method, and `explore`: sliders that also move in the built page.

matplotlib and ipywidgets are imported where they are used, so that `import zo_tutorial` stays quick.
"""

import base64
import html
import io
import itertools
import json
import numbers
import traceback
from typing import Any

# The palette of Okabe and Ito, which colour-blind readers can tell apart; its yellow is too pale on white and left out.
# Each method has a line style and a marker of its own as well, so that a figure also reads in grey.
METHODS: dict[str, dict[str, Any]] = {
    "FO": {"label": "first-order", "color": "#000000", "linestyle": "--", "marker": "None"},
    "SGD": {"label": "ZO-SGD", "color": "#0072B2", "linestyle": "-", "marker": "o"},
    "SCD": {"label": "SCD sign", "color": "#E69F00", "linestyle": "-.", "marker": "s"},
    "STP": {"label": "SCD sign, three points", "color": "#CC79A7", "linestyle": ":", "marker": "D"},
    "SCD_batch": {"label": "SCD batch", "color": "#009E73", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "^"},
    "SCD_esti": {"label": "SCD esti", "color": "#D55E00", "linestyle": (0, (8, 1)), "marker": "v"},
    "mix": {"label": "SGD, then SCD", "color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1)), "marker": "X"},
}

# The networks that chapters 5, 7 and 8 compare: how the weights to train were chosen, or the format they have.
NETS = {
    "dense": {"label": "dense", "color": "#000000", "linestyle": "--", "marker": "x"},
    "grasp": {"label": "GraSP", "color": "#009E73", "linestyle": "-", "marker": "o"},
    "shuffle": {"label": "GraSP, shuffled", "color": "#56B4E9", "linestyle": "-.", "marker": "s"},
    "snip": {"label": "SNIP", "color": "#D55E00", "linestyle": (0, (8, 1)), "marker": "v"},
    "magnitude": {"label": "magnitude", "color": "#CC79A7", "linestyle": ":", "marker": "D"},
    "random": {"label": "random, equal shares", "color": "#777777", "linestyle": (0, (3, 1, 1, 1)), "marker": "X"},
    "TT": {"label": "TT", "color": "#E69F00", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
    "TTM": {"label": "TTM", "color": "#0072B2", "linestyle": "-", "marker": "^"},
}

MAX_FRAMES = 60  # of one `explore`: at about 20 kB a frame, 1.2 MB in the page


def _style():
    """The rcParams of the book: 696 pixels wide, type that still reads at half that width, on white in any theme."""
    from matplotlib.rcsetup import cycler

    looks = [look for method, look in METHODS.items() if method != "FO"]
    return {
        "figure.figsize": (5.8, 3.6),
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.labelsize": 11,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 10,
        "legend.edgecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#d9d9d9",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "image.cmap": "cividis",
        "axes.prop_cycle": cycler(**{key: [look[key] for look in looks] for key in ("color", "linestyle")}),
    }


def use_style():
    """Give every matplotlib figure of this process the style of the book."""
    import matplotlib

    matplotlib.rcParams.update(_style())


def plot_curves(records, x="queries", y="val_accuracy", ax=None):
    """Draw the curve of each record in the colour, line and marker of its method; first-order runs as ceilings.

    Args:
        records: recorded runs, each a dict with `name` (its last part is the method: `SGD`, `MNIST/TTM/SCD_esti`,
            `MNIST/TTM/rank6_SCD_esti`; any other name stands for itself) and `curve`, a list of points
            `{"epoch", "queries", "seconds", "loss", "val_accuracy"}`. Runs of one method, such as its seeds, share a
            line in the legend.
        x: what a point is drawn against, a key of the points: `"queries"` (on a log scale: a point at zero queries
            is not drawn), `"seconds"` or `"epoch"`.
        y: what is drawn, a key of the points.
        ax: the matplotlib Axes; None, the default, takes the current one.

    Returns:
        The Axes. A first-order run (method `FO`) is a dashed horizontal line at its last value: one of its steps
        counts one query, so its own curve would stand at the left edge of the axis.
    """
    import matplotlib.pyplot as plt

    ax = plt.gca() if ax is None else ax
    drawn = set()
    for record in records:
        method, curve = _method(record["name"]), record["curve"]
        look = METHODS.get(method, {"label": method}) | ({"label": "_nolegend_"} if method in drawn else {})
        drawn.add(method)
        if method == "FO":
            ax.axhline(curve[-1][y], **look)
        else:
            ax.plot([point[x] for point in curve], [point[y] for point in curve], markevery=0.15, **look)
    if x == "queries":
        ax.set_xscale("log")
    ax.set(xlabel=_AXIS_LABELS.get(x, x), ylabel=_AXIS_LABELS.get(y, y))
    if y.endswith(("accuracy", "f1")):
        ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend()
    return ax


_AXIS_LABELS = {
    "queries": "loss queries",
    "seconds": "seconds",
    "val_accuracy": "validation accuracy",
    "val_intent_accuracy": "validation intent accuracy",
    "val_slot_f1": "validation slot F1",
}


def _method(name):
    """The key of METHODS that a record's name ends in, the longest one; the name itself where it ends in none."""
    last = name.split("/")[-1]
    for method in sorted(METHODS, key=len, reverse=True):
        if last == method or last.endswith("_" + method):
            return method
    return name


def explore(draw, **grid):
    """A figure with one slider per parameter: alive in a notebook, and in a built page without kernel or network.

    Every frame is drawn when `explore` is called, so an error in `draw` fails the cell. The last expression of a cell
    shows the result: as live ipywidgets where the cell was sent by a front end that has them (JupyterLab, VS Code),
    where each move draws anew, and everywhere else as the frames and sliders in plain HTML. A viewer that shows
    neither takes the first frame as a picture.

    Args:
        draw: `draw(ax, **params)` draws one frame on the matplotlib Axes `ax`. It may return a sentence that says
            what the frame shows, its alternative text; otherwise title and axis labels make one.
        **grid: 1 to 3 parameters, each with the sequence of its values. The first value of each is shown first.

    Returns:
        An object for a notebook to display.

    Raises:
        ValueError: no parameter or more than three, a parameter without values, or more than `MAX_FRAMES` frames.

    Example:
        >>> import math
        >>> def draw(ax, frequency):
        ...     ax.plot([math.sin(frequency * t / 20) for t in range(200)])
        >>> explore(draw, frequency=[1, 2, 3])
        explore(frequency=['1', '2', '3'])
    """
    return _Explorer(draw, {name: list(values) for name, values in grid.items()})


class _Explorer:
    def __init__(self, draw, grid):
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"explore takes 1 to 3 parameters, not {len(grid)}: {', '.join(grid) or 'none'}")
        for name, values in grid.items():
            if not values:
                raise ValueError(f"explore: parameter {name!r} has no values")
        frames = 1
        for values in grid.values():
            frames *= len(values)
        if frames > MAX_FRAMES:
            sizes = " × ".join(f"{len(values)} {name}" for name, values in grid.items())
            raise ValueError(f"explore: {sizes} makes {frames} frames, at most {MAX_FRAMES} fit in a page")
        self.draw, self.grid = draw, grid
        self.texts = {name: [_text(value) for value in values] for name, values in grid.items()}
        # In the order of itertools.product: the last parameter runs fastest.
        self.frames = [self._frame(dict(zip(grid, point, strict=True))) for point in itertools.product(*grid.values())]

    def __repr__(self):
        return f"explore({', '.join(f'{name}={texts}' for name, texts in self.texts.items())})"

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = {"text/plain": repr(self), "text/html": self._html(), "image/png": self.frames[0][0]}
        if _front_end_has_widgets():
            bundle = self._widget()._repr_mimebundle_() | bundle
        return bundle

    def _frame(self, params):
        """Draw one frame -> (PNG in base64, alternative text)."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        with matplotlib.rc_context(_style()):
            canvas = FigureCanvasAgg(Figure(dpi=160))
            ax = canvas.figure.subplots()
            alt = self.draw(ax, **params) or _describe(ax, params)
            canvas.draw()
        picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
        png = io.BytesIO()  # no date and no version in it, so runs give the same bytes
        _in_few_colours(picture, _has_colour_map(canvas.figure)).save(png, "PNG", optimize=True)
        return base64.b64encode(png.getvalue()).decode(), alt

    def _html(self):
        """Picture, sliders and the lines of script that move it; no id, so that many may stand on one page."""
        pngs, alts = zip(*self.frames, strict=True)
        named = {name.replace("_", " "): texts for name, texts in self.texts.items()}
        label = html.escape(f"Figure with sliders: {', '.join(named)}")
        state = {"pngs": pngs, "alts": alts, "texts": list(self.texts.values())}
        sliders = "".join(
            f'<label style="display:flex;gap:0.7em;align-items:center;margin:0.3em 0">'
            f'<span style="min-width:6em">{html.escape(name)}</span>'
            f'<input type="range" min="0" max="{len(texts) - 1}" step="1" value="0" autocomplete="off"'
            f' aria-label="{html.escape(name)}" aria-valuetext="{html.escape(texts[0])}" style="flex:1">'
            f'<output style="min-width:4em">{html.escape(texts[0])}</output></label>'
            for name, texts in named.items()
        )
        return (
            f'<div class="zo-explore" role="group" aria-label="{label}" style="max-width:696px"'
            f' data-state="{html.escape(json.dumps(state))}">'
            f"{_img(*self.frames[0])}{sliders}<script>{_SCRIPT}</script></div>"
        )

    def _widget(self):
        """The same figure and sliders as ipywidgets; each move calls `draw` again."""
        import ipywidgets

        picture = ipywidgets.HTML(_img(*self.frames[0]))
        sliders = {
            name: ipywidgets.SelectionSlider(
                options=[(text, k) for k, text in enumerate(texts)],
                description=name.replace("_", " "),
                continuous_update=False,
            )
            for name, texts in self.texts.items()
        }

        def show(change):
            try:
                picture.value = _img(*self._frame({name: self.grid[name][s.value] for name, s in sliders.items()}))
            except Exception:  # a widget swallows what its callback raises: show it in place of the picture
                picture.value = f"<pre>{html.escape(traceback.format_exc())}</pre>"

        for slider in sliders.values():
            slider.observe(show, names="value")
        return ipywidgets.VBox([picture, *sliders.values()])


def _has_colour_map(figure):
    """Whether colours of the figure stand for numbers: an image, a mesh, or a collection that has values."""
    return any(artist.get_array() is not None for ax in figure.axes for artist in (*ax.images, *ax.collections))


def _in_few_colours(picture, exact):
    """The picture with a palette, which makes a file of lines and text a third as large.

    64 colours do for lines and text. Where colours stand for numbers (`exact`) the palette has 256, and none at all if
    it would move a colour by more than 4 of 255 levels.
    """
    from PIL import Image, ImageChops

    small = picture.quantize(256 if exact else 64, dither=Image.Dither.NONE)
    if exact and max(ImageChops.difference(picture, small.convert("RGB")).tobytes()) > 4:
        return picture
    return small


# Several of these may run on one page, and in any order: each starts every figure that none has started yet.
_SCRIPT = """
for (const box of document.querySelectorAll(".zo-explore:not([data-ready])")) {
  box.dataset.ready = "yes";
  const {pngs, alts, texts} = JSON.parse(box.dataset.state);
  const picture = box.querySelector("img"), sliders = [...box.querySelectorAll("input")];
  const show = () => {
    const frame = sliders.reduce((index, slider, k) => index * texts[k].length + Number(slider.value), 0);
    picture.src = "data:image/png;base64," + pngs[frame];
    picture.alt = alts[frame];
    sliders.forEach((slider, k) => {
      slider.nextElementSibling.textContent = texts[k][slider.value];
      slider.setAttribute("aria-valuetext", texts[k][slider.value]);
    });
  };
  sliders.forEach(slider => slider.addEventListener("input", show));
}
"""


def _img(png, alt):
    return (
        f'<img src="data:image/png;base64,{png}" alt="{html.escape(alt)}"'
        ' width="696" height="432" style="max-width:100%;height:auto">'
    )


def _text(value):
    """A value as its slider shows it."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{value:g}"
    return str(value)


def _describe(ax, params):
    """Alternative text of a frame out of what its Axes says."""
    shown = ax.get_title() or "A figure"
    if ax.get_xlabel() and ax.get_ylabel():
        shown += f": {ax.get_ylabel()} against {ax.get_xlabel()}"
    return f"{shown}, for {', '.join(f'{name} = {_text(value)}' for name, value in params.items())}."


def _front_end_has_widgets():
    """Whether the running cell came from an interactive front end: those name the cell in their request.

    A build or a test (nbclient, nbval) does not. Offering it a widget would leave in the notebook the random name of a
    widget that is gone, and front ends would show an error in place of the picture.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in kernel.get_parent().get("metadata", {})
