"""Pictures of routing (needs the `plots` extra)."""

from pathlib import Path

import torch


def load_heat_map(load: torch.Tensor, layers: list[int], file: Path, title: str) -> None:
    """Draws `expert_load` as a layer × expert heat map into `file` (PNG).

    Colours are relative to perfect balance, which is white: an expert may receive from nothing to twice its share
    or more. Each cell holds its share in percent.

    Args:
        load: (layers, experts) shares, each row summing to 1.
        layers: the layers' indices in the model.
    """
    from matplotlib.figure import Figure

    rows, columns = load.shape
    figure = Figure(figsize=(2.2 + 0.75 * columns, 1.5 + 0.5 * rows), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(load * columns, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            share = float(load[row, column])
            dark = abs(share * columns - 1) > 0.7
            axes.text(
                column,
                row,
                f"{100 * share:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(columns), [str(expert) for expert in range(columns)])
    axes.set_yticks(range(rows), [str(layer) for layer in layers])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=11)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0", "½", "1 = balanced", "1½", "≥ 2"])
    bar.set_label("times its fair share")
    figure.savefig(file)
