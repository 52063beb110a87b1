"""A picture whose instances are tinted."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mifo.report.palette import instance_colour


def draw_masks(picture: Image.Image, masks: Tensor) -> Image.Image:
    """Draw the picture in grey, and what each mask (N, H, W) in [0, 1] covers in its instance's colour."""
    soft = F.interpolate(masks[None].float().cpu(), picture.size[::-1], mode="bilinear", antialias=True)[0]
    grey = torch.from_numpy(np.array(picture.convert("L"))).float()[..., None]
    drawn = (0.35 * grey + 0.65 * 235).expand(-1, -1, 3)  # a pale background
    for index, mask in enumerate(soft.clamp(0, 1)):
        colour = torch.tensor(instance_colour(index)).float()
        # Dark stays dark and light becomes pale, so that the covered thing stays recognisable.
        tinted = torch.lerp(colour * (0.25 + 0.75 * grey / 255), grey, 0.2)
        drawn = torch.lerp(drawn, tinted, mask[..., None])
    return Image.fromarray(drawn.round().clamp(0, 255).byte().numpy())
