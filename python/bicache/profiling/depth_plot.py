"""The picture of a depth table. matplotlib is imported here only, and only when one is drawn."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .agreement import run_time_table
from .depth_table import RATIO_KINDS, RATIOS, DepthTable, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping


def write_plot(table: DepthTable, path: str | os.PathLike[str]) -> None:
    """Draws `table` into the file `path`; see DepthTable.plot."""
    check_plot(path)
    draw(table).savefig(path)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises what write_plot would, without a table: before the work that it shows."""
    formats = _matplotlib("backends.backend_agg").FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in formats:
        raise ValueError(
            f"[plot] {os.fspath(path)}: expected a name ending in "
            f"{', '.join(sorted(formats))}, got another"
        )


def draw(table: DepthTable) -> Any:
    """A matplotlib Figure: similarity by ratio and layer (blank: no data), the depths over it."""
    figure = _matplotlib("figure").Figure(figsize=(9, 5), layout="constrained", dpi=120)
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    similarity = np.ma.masked_invalid(table.similarity)
    # Ratio r is the column from r - 0.5 to r + 0.5, layer l the row from l to l + 1: so a depth b
    # is the line above the layers 0..b-1.
    edges = np.arange(RATIOS + 1) - 0.5
    mesh = axes.pcolormesh(edges, np.arange(table.layers + 1), similarity.T, cmap="viridis", vmax=1)
    figure.colorbar(mesh, ax=axes, label="cosine of the prefix's K and V, alone / in full")
    handles = [_stairs(axes, table.table, edges, "red", f"similarity > {table.tau:g}", table.ratio)]
    if table.agreement and all(b.depth is not None for b in table.agreement):
        measured = run_time_table(table.agreement)
        label = f"agreement >= {table.min_agreement:g}"
        handles.append(_stairs(axes, measured, edges, "black", label, "request"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    axes.patch.set(facecolor="white", edgecolor="lightgrey", hatch="//")  # shows where no data is
    axes.locator_params(axis="y", integer=True)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, table.layers)
    axes.set_xlabel(f"prefix tokens, percent: {RATIO_KINDS[table.ratio]}; hatched: no data")
    axes.set_ylabel("layer; the lines: reusable depth")
    return figure


def _stairs(
    axes: Any, depths: Mapping[int, int], edges: Any, colour: str, label: str, ratio: str
) -> Any:
    values = [read_table(depths, r) for r in range(RATIOS)]
    text = f"depth by {label}, at {RATIO_KINDS[ratio]}"
    return axes.stairs(values, edges, baseline=None, color=colour, linewidth=2, label=text)


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            "[plot] matplotlib: expected it to be installed (pip install 'bicache[plot]'), "
            f"got: {error}"
        ) from None
