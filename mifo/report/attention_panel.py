"""Attention maps over the image they were read on: one row per token, one column per layer."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mifo.report.palette import hexadecimal, instance_colour, text_colour

COLOURS = matplotlib.colormaps["magma"]


def draw_attention(
    image: Tensor, masks: Tensor, tokens: Sequence[str], maps: Mapping[str, Tensor]
) -> Image.Image:
    """Draw `maps`, (N, R, R) by layer name, over `image` (3, H, W) in [0, 1], with each mask's outline.

    Every map is scaled to its own maximum, which stands in its corner; masks are (N, H, W) in [0, 1].
    """
    figure = Figure(figsize=(1.6 * (len(maps) + 1), 1.5 * len(tokens) + 0.35), dpi=144, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.04)
    axes = figure.subplots(len(tokens), len(maps) + 1, squeeze=False)
    picture = image.permute(1, 2, 0).numpy()
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    for row, token, mask, index in zip(axes, tokens, masks, range(len(tokens)), strict=True):
        colour = hexadecimal(instance_colour(index))
        ink = hexadecimal(text_colour(instance_colour(index)))
        row[0].imshow(picture)
        row[0].set_ylabel(token, color=ink, backgroundcolor=colour, fontsize=9, labelpad=8)
        for axis, each in zip(row[1:], maps.values(), strict=True):
            large = F.interpolate(each[index][None, None], image.shape[1:], mode="bilinear")[0, 0].numpy()
            heat = large / max(large.max(), 1e-12)
            strength = 0.25 + 0.7 * heat[..., None]
            axis.imshow(np.clip((1 - strength) * grey + strength * COLOURS(heat)[..., :3], 0, 1))
            axis.text(
                0.96,
                0.04,
                f"max {each[index].max():.2f}",
                transform=axis.transAxes,
                ha="right",
                color="white",
                fontsize=6.5,
                path_effects=[withStroke(linewidth=1.5, foreground="#000000b0")],
            )
        for axis in row:
            axis.contour(mask.numpy(), levels=[0.5], colors=[colour], linewidths=1.2)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, name in zip(axes[0], ["image", *maps], strict=True):
        axis.set_title(name, fontsize=9, color="#5d5d66")
    return render(figure)


def render(figure: Figure) -> Image.Image:
    """Turn a figure into an RGB image, without any window."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
