"""The masks of an image at every size that a model reads, made once."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mifo.errors import MifoError


@dataclass(frozen=True)
class MaskPyramid:
    """Masks of N instances, of the image and of its mirror image, and a row N that stands for no instance."""

    # by the size (h, w) of attention maps, (2, N + 1, h, w) in [0, 1], bilinear; without antialiasing, as in
    # MIFO, since antialiased masks move the attention loss by up to a tenth
    at: dict[tuple[int, int], Tensor]
    latent: Tensor  # the same at the size of the latents, by the nearest pixel, for the denoising loss

    @classmethod
    def of(
        cls, masks: Tensor, sizes: Collection[tuple[int, int]], latent_size: tuple[int, int]
    ) -> "MaskPyramid":
        """From masks (N, H, W) in [0, 1]."""
        both = torch.stack([masks, masks.flip(-1)])
        both = torch.cat([both, torch.zeros_like(both[:, :1])], 1)
        return cls(
            {size: F.interpolate(both, size=size, mode="bilinear", antialias=False) for size in sizes},
            F.interpolate(both, size=latent_size, mode="nearest"),
        )

    def check(self) -> None:
        """Refuse a mask that marks none of the latents, so that nothing would be learned of its instance."""
        height, width = self.latent.shape[-2:]
        for i, mark in enumerate(self.latent[0, :-1].amax((-2, -1)).tolist()):
            if not mark:
                raise MifoError(
                    f"<asset{i}> is too small to be learned, since its mask marks none of the "
                    f"{height}×{width} latents; paint more of it, or cut the picture closer."
                )

    def rows(self, mirrored: int, instances: list[int]) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
        """The masks of some instances, (K, h, w) by size, and at the size of the latents."""

        # picked one by one: a list as an index would travel to the GPU and wait for it
        def picked(level: Tensor) -> Tensor:
            return torch.stack([level[mirrored, row] for row in instances])

        return {size: picked(level) for size, level in self.at.items()}, picked(self.latent)
