"""How figures are drawn and kept: a mean with its band, plain axes, a PNG file."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flaxbn.inference.artifact import replace_file


def draw_band(
    ax: Axes,
    x: Iterable[float],
    mean: Any,
    spread: Any,
    *,
    label: str,
    color: str,
    marker: str = "o",
    line: str = "-",
    size: float = 4,
) -> None:
    """The means as a line with markers of `size` points, in a band of one `spread` to each side."""
    x, mean, spread = np.array([*x]), np.asarray(mean), np.asarray(spread)
    ax.plot(x, mean, marker=marker, linestyle=line, label=label, color=color, markersize=size)
    ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)


def leave_open(ax: Axes) -> None:
    """A light grid, and no frame at the top and on the right."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def save(fig: Figure, path: pathlib.Path) -> None:
    """Writes a PNG file, or none where that fails."""
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=150)
    replace_file(path, content.getvalue())
