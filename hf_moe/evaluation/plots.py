"""Pictures of a classification: what is taken for what, and how sure it is."""

from pathlib import Path
from typing import Any

MOST = 40  # classes in a picture


def draw(measured: Any, names: list[str] | None, folder: Path, ending: str, title: str) -> list[str]:
    """Writes the pictures that help, and gives their names."""
    made = []
    confusion, bins = measured.tables.get("confusion_matrix"), measured.tables.get("reliability")
    if confusion is not None and names is not None and len(names) <= MOST:
        made.append(f"confusion{ending}.png")
        confusion_map(confusion, names, folder / made[-1], title)
    if bins is not None:
        made.append(f"reliability{ending}.png")
        reliability_bars(bins, folder / made[-1], title)
    return made


def confusion_map(counts: list[list[int]], names: list[str], file: Path, title: str) -> None:
    """Rows: the true class; columns: the predicted one; colour: share of the row."""
    import numpy as np
    from matplotlib.figure import Figure

    table = np.array(counts, dtype=float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10, parse_math=False)
    if len(names) <= MOST // 2:
        for row, values in enumerate(counts):
            for column, value in enumerate(values):
                color = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.savefig(file)


def reliability_bars(bins: list[dict[str, Any]], file: Path, title: str) -> None:
    """How often predictions of a confidence are right; on the line they would be as good as they say."""
    from matplotlib.figure import Figure

    held = [entry for entry in bins if entry["count"]]
    width = 1 / len(bins)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    places = [entry["from"] + width / 2 for entry in held]
    axes.bar(places, [entry["accuracy"] for entry in held], width * 0.9, color="#0072B2")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share that is right")
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.savefig(file)
