"""The U-Net of the reference vectors as the method sees a model."""

from diffusers import UNet2DConditionModel
from torch import Tensor

from mifo.backbones.unet.model import AttentiveUNet
from mifo.method.backbone import Conditioning, Site
from mifo.method.diffusion.ddim import DDIM


class VectorModel(AttentiveUNet):
    """A U-Net and a noise process, without text encoders and autoencoder.

    Args:
        side: of the latents, by which the sizes of the sites are known.
    """

    def __init__(self, unet: UNet2DConditionModel, process: DDIM, side: int = 32) -> None:
        unet.register_to_config(sample_size=side)
        super().__init__(unet)
        self.process = process
        self.latent_shape = (4, side, side)


def prompt(states: Tensor) -> Conditioning:
    """Hidden states (B, L, width) as what a prompt becomes."""
    return Conditioning({"states": states})


def cross_number(model: AttentiveUNet, site: Site) -> int:
    """Which of the U-Net's cross-attention layers a site is, counted from 0 as in the vectors."""
    return [each for each in model.sites if each.kind == "words"].index(site)
