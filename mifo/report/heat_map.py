"""The leakage matrix as a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from mifo.report.attention_panel import render


def draw_leakage(matrix: Sequence[Sequence[float | None]], tokens: Sequence[str]) -> Image.Image:
    """Draw shares (N × N) in [0, 1]: rows are boxes, columns the instances in them; None is blank."""
    side = 1.5 + 0.7 * len(tokens)
    figure = Figure(figsize=(side + 0.4, side), dpi=144, layout="constrained")
    axes = figure.subplots()
    values = [[float("nan") if value is None else value for value in row] for row in matrix]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            if share is not None:
                colour = "white" if share > 0.55 else "#18181b"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(tokens)), tokens)
    axes.set_yticks(range(len(tokens)), tokens)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="share of", ylabel="box of")
    return render(figure)
