"""Figures of the book: one look, the same colour for the same method everywhere, bands over
independent runs.

Colours are those of Okabe and Ito, which people with colour-blindness can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_rgb
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from rlhf_helpers._validate import as_numbers, check_text, has, in_range

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#777777"

COLOURS = {
    "optimum": BLACK,
    "reinforce": BLUE,
    "best_of_n": GREEN,
    "dpo": PURPLE,
    "grpo": SKY,
    "no baseline": VERMILION,
    "ppo_clip": ORANGE,
    "no clipping": VERMILION,
    "ppo_penalty": PURPLE,
    "trpo": GREEN,
    "epsilon_greedy": SKY,
    "ucb": PURPLE,
}

PANEL = (
    ("reward", "reward"),
    ("kl", "KL from start (nats)"),
    ("entropy", "entropy (nats)"),
    ("clip_fraction", "clip fraction"),
    ("approx_kl", "approx. KL (nats)"),
    ("grad_norm", "gradient norm"),
    ("length", "length (tokens)"),
    ("explained_variance", "explained variance"),
)
_BELOW_ZERO = ("reward", "explained_variance")  # nothing else of the panel can be negative


def use_style() -> None:
    """Set the look of every figure that follows."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
        }
    )


def interval(
    runs: Tensor | np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs and its Student-t interval: runs [R, T] -> (mean, low, high), each [T].

    Raises: ValueError with fewer than three runs.
    """
    runs = _as_runs(runs)
    in_range(level, "level", 0.0, 1.0)
    if len(runs) < 3:
        raise ValueError(f"runs holds {len(runs)} runs; an interval needs three or more")
    mean = runs.mean(0)
    half = stats.t.ppf(0.5 + level / 2, len(runs) - 1) * runs.std(0, ddof=1) / np.sqrt(len(runs))
    return mean, mean - half, mean + half


def _as_runs(runs: Tensor | np.ndarray) -> np.ndarray:
    found = as_numbers(runs, "runs").numpy()
    if found.ndim != 2:
        raise ValueError(f"runs has shape {found.shape}; pass [runs, points]")
    return found


def _check_colour(colour: str) -> None:
    if not is_color_like(colour):
        raise ValueError(f"colour={colour!r} is none; pass a name or a code like '#E69F00'")


def band(
    ax: Axes,
    x: Sequence[float],
    runs: Tensor | np.ndarray,
    colour: str,
    label: str | None = None,
    faint: int = 10,
    floor: float = -np.inf,
) -> None:
    """Draw the mean of runs [R, T] strong, its 95 % interval as a band that ends at `floor`, and up
    to `faint` single runs behind.

    Raises: ValueError as `interval`, or on another number of x than of points.
    """
    has(ax, "ax", "axes of Matplotlib", "plot", "fill_between")
    _check_colour(colour)
    in_range(faint, "faint", 0)
    in_range(floor, "floor", -math.inf, infinite=True)
    runs = _as_runs(runs)
    x = as_numbers(x, "x").numpy()
    if x.shape != runs.shape[1:]:
        raise ValueError(
            f"x must be a list of {runs.shape[1]} numbers, one for each column of runs"
        )
    if label is not None:
        check_text(label, "label")
    mean, low, high = interval(runs)
    for run in runs[:faint]:
        ax.plot(x, run, color=colour, alpha=0.12, linewidth=0.7, zorder=1)
    ax.fill_between(
        x, np.maximum(low, floor), high, color=colour, alpha=0.25, linewidth=0, zorder=2
    )
    ax.plot(x, mean, color=colour, label=label, zorder=3)


def optimum(ax: Axes, value: float, text: str = "optimum") -> None:
    """Draw the best possible value as a dashed line with its number."""
    has(ax, "ax", "axes of Matplotlib", "axhline", "annotate")
    in_range(value, "value", -math.inf)
    check_text(text, "text")
    ax.axhline(value, color=COLOURS["optimum"], linestyle="--", linewidth=1.2, zorder=2)
    ax.annotate(
        f"{text} {value:.2f}",
        (0.01, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
    )


def label_line(
    ax: Axes, x: float, y: float, text: str, colour: str, offset: tuple[float, float] = (6, 0)
) -> None:
    """Write a line's name beside its point (x, y), in a darker shade of its colour; `offset` in
    points."""
    has(ax, "ax", "axes of Matplotlib", "annotate")
    _check_colour(colour)
    in_range(x, "x", -math.inf)
    in_range(y, "y", -math.inf)
    check_text(text, "text")
    offset = as_numbers(offset, "offset").numpy()
    if offset.shape != (2,) or not np.isfinite(offset).all():
        raise ValueError(f"offset={offset!r} must be two numbers, in points")
    ink = tuple(0.7 * part for part in to_rgb(colour))  # thin letters need more contrast than lines
    ax.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", color=ink, va="center", fontsize=9
    )


def finish(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title that states the message, and axes with their units."""
    has(ax, "ax", "axes of Matplotlib", "set_title", "set_xlabel", "set_ylabel")
    for name, text in (("title", title), ("xlabel", xlabel), ("ylabel", ylabel)):
        check_text(text, name)
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def _check_histories(histories: dict[str, Sequence], colours: dict[str, str]) -> None:
    has(histories, "histories", "a dictionary from method to its Metrics", "items")
    has(colours, "colours", "a dictionary from method to colour", "get")
    if not histories:
        raise ValueError("histories is empty; pass at least one")
    for method, history in histories.items():
        if not hasattr(history, "__len__") or len(history) == 0:
            raise ValueError(f"histories[{method!r}] must be a list with at least one Metrics")
        if colours.get(method) is None:
            raise ValueError(f"colours has none for {method!r}; give it one")
        _check_colour(colours[method])


def diagnostics(
    histories: dict[str, Sequence], colours: dict[str, str], xlabel: str = "iteration"
) -> Figure:
    """The panel that goes with every training run: one small plot a quantity, one colour a method.

    Args:
        histories: method -> its Metrics, one an iteration; every field of the panel that they have
            is drawn.
        colours: method -> colour.
        xlabel: what one Metrics stands for.
    Raises: ValueError on no history, an empty one, or a method without a colour.
    """
    _check_histories(histories, colours)
    check_text(xlabel, "xlabel")
    first = next(iter(histories.values()))[0]
    fields = [(name, label) for name, label in PANEL if hasattr(first, name)]
    columns = 3
    rows = -(-len(fields) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4, 1.8 * rows), sharex=True, squeeze=False
    )
    for ax, (name, label) in zip(axes.flat, fields, strict=False):
        for method, history in histories.items():
            runs = torch.stack([getattr(one, name) for one in history], dim=1)
            floor = -np.inf if name in _BELOW_ZERO else 0.0
            x = range(1, len(history) + 1)
            band(ax, x, runs, colours[method], label=method, faint=0, floor=floor)
        ax.set_title(label, fontsize=9, fontweight="normal")
        ax.tick_params(labelsize=8)
    for ax in axes.flat[len(fields) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel(xlabel, fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
