"""Pictures of routing (needs the `plots` extra)."""

from pathlib import Path
from typing import Any

import torch

NUMBERED = 32  # columns; more than that, and cells are too small for numbers


def load_heat_map(load: torch.Tensor, layers: list[int], file: Path, title: str) -> None:
    """Draws the load of experts as a layer × expert heat map into `file` (PNG).

    Colours are relative to perfect balance, which is white: an expert may receive from nothing to twice its share
    or more. Each cell holds its share in percent, as long as there is room.

    Args:
        load: (layers, experts) shares, each row summing to 1.
        layers: the layers' indices in the model.
    """
    from matplotlib.figure import Figure

    rows, columns = load.shape
    cell = 0.75 if columns <= NUMBERED else 0.15
    figure = Figure(figsize=(2.2 + cell * columns, 1.5 + 0.5 * rows), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(load * columns, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    if columns <= NUMBERED:
        _number(axes, load)
    step = 1 if columns <= NUMBERED else 8
    axes.set_xticks(range(0, columns, step), [str(expert) for expert in range(0, columns, step)])
    axes.set_yticks(range(rows), [str(layer) for layer in layers])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=11, parse_math=False)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0", "½", "1 = balanced", "1½", "≥ 2"])
    bar.set_label("times its fair share")
    figure.savefig(file)


def _number(axes: Any, load: torch.Tensor) -> None:
    for row, shares in enumerate(load.tolist()):
        for column, share in enumerate(shares):
            color = "white" if abs(share * len(shares) - 1) > 0.7 else "black"
            axes.text(column, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=9, color=color)


def coactivation_map(lift: torch.Tensor, layers: list[int], file: Path, title: str) -> None:
    """Draws which experts are chosen together, one square a layer, into `file` (PNG).

    Args:
        lift: (layers, E, E), how often over how often by chance; the diagonal is left grey.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(1.2 + 2.4 * columns, 0.8 + 2.5 * rows), layout="constrained", dpi=150)
    squares = figure.subplots(rows, columns, squeeze=False).flatten()
    apart = ~torch.eye(lift.shape[1], dtype=torch.bool)
    for axes, layer, values in zip(squares, layers, lift, strict=False):
        axes.set_facecolor("0.8")
        image = axes.imshow(values.where(apart, float("nan")), cmap="RdBu_r", vmin=0.0, vmax=2.0)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in squares[len(layers) :]:
        axes.axis("off")
    bar = figure.colorbar(image, ax=list(squares), ticks=[0, 1, 2])
    bar.ax.set_yticklabels(["0", "1 = by chance", "≥ 2"])
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(file)


def specialisation_bars(found: dict[str, Any], file: Path, title: str) -> None:
    """Draws how much a token's domain tells of its expert, by layer, and how much shuffled labels do (PNG).

    Args:
        found: `Specialisation.to_json()`; layers with p <= 0.05 have a star.
    """
    from matplotlib.figure import Figure

    places = range(len(found["layers"]))
    figure = Figure(figsize=(2.5 + 0.6 * len(places), 3.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.bar([place - 0.2 for place in places], found["information"], 0.4, label="domains", color="#0072B2")
    if found["by_chance"] is not None:
        axes.bar([place + 0.2 for place in places], found["by_chance"], 0.4, label="shuffled", color="#BBBBBB")
        for place, p in zip(places, found["p_values"], strict=True):
            axes.text(place - 0.2, found["information"][place], "*" if p <= 0.05 else "", ha="center")
    axes.set_xticks(places, [str(layer) for layer in found["layers"]])
    axes.set_xlabel("layer")
    axes.set_ylabel("mutual information, nats")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.legend(fontsize=8)
    figure.savefig(file)
