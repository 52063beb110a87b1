"""The sites of a diffusers U-Net in order of execution, and those that the method reads by default.

On Stable Diffusion 1.x and 2.x, of four levels, there are 32 layers (self, then cross, in each block), 16 of
them cross-attention: down 0–5, mid 6, up 7–15. Elsewhere the same layers are found by place and resolution.
Stable Diffusion XL has three levels, the first without attention; its 140 layers are in modules of 2 and 10
blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mifo.errors import MifoError
from mifo.method.backbone import DefaultSites, Kind, Site

Place = Literal["down", "mid", "up"]


@dataclass(frozen=True)
class PlacedSite:
    """A site and where it stands in the U-Net.

    Attributes:
        place, block: part of the U-Net, and number of the block within it.
        divisor: side of the latents over side of the map.
        last: whether it is in the last transformer block of its attention module.
    """

    site: Site
    place: Place
    block: int
    divisor: int
    last: bool


def network_sites(unet: Any) -> tuple[PlacedSite, ...]:
    """The attention layers of a diffusers `UNet2DConditionModel` in order of execution.

    Raises:
        MifoError: an attention layer lies outside the transformer blocks, so that its place is not known.
    """
    found: list[PlacedSite] = []
    side = unet.config.sample_size
    for place, number, divisor, path, block in _blocks(unet):
        for transformer, attention in enumerate(getattr(block, "attentions", None) or ()):
            blocks = getattr(attention, "transformer_blocks", ())
            for inner, transformer_block in enumerate(blocks):
                for attribute in ("attn1", "attn2"):
                    if (module := getattr(transformer_block, attribute)) is None:
                        continue
                    name = f"{path}.attentions.{transformer}.transformer_blocks.{inner}.{attribute}"
                    kind: Kind = "words" if module.is_cross_attention else "pixels"
                    site = Site(len(found), name, kind, (side // divisor, side // divisor))
                    found.append(PlacedSite(site, place, number, divisor, inner == len(blocks) - 1))
    layers = {name.removesuffix(".processor") for name in unet.attn_processors}
    if unknown := layers - {each.site.name for each in found}:
        raise MifoError(
            f"The U-Net's attention layer {min(unknown)} is not part of a transformer block; "
            "use a U-Net whose blocks are CrossAttnDownBlock2D, CrossAttnUpBlock2D and their kin."
        )
    return tuple(found)


def choose_sites(placed: tuple[PlacedSite, ...]) -> DefaultSites:
    """Choose by place and relative resolution.

    D is the divisor of the first up block with attention; in brackets Stable Diffusion's layers (D = 4):
    `semantic` has the cross layers of the first two up blocks that have attention [cross 7–12], `finetuning`
    the cross layers of the down and up blocks of divisor D [cross 4, 5, 7, 8, 9], `guidance` all layers of
    the mid block and of the first up block that has attention [12–19], `shapes` all layers of that up block
    [14–19]. Of an attention module with several transformer blocks, as Stable Diffusion XL's (D = 4), the
    last block stands for all: XL's 6, 5, 8 and 6 sites are as many as Stable Diffusion's, so that the
    weights of the losses mean the same.

    Raises:
        MifoError: no up block has cross-attention.
    """
    placed = tuple(each for each in placed if each.last)
    up_blocks = sorted({each.block for each in placed if each.place == "up" and each.site.kind == "words"})
    if not up_blocks:
        raise MifoError(
            "The U-Net has no cross-attention in its up blocks, where the words' maps are read; "
            "use a text-to-image U-Net such as Stable Diffusion's."
        )
    shapes = [each for each in placed if each.place == "up" and each.block == up_blocks[0]]
    words = [each for each in placed if each.site.kind == "words"]
    divisor = shapes[0].divisor
    return DefaultSites(
        semantic=tuple(each.site for each in words if each.place == "up" and each.block in up_blocks[:2]),
        finetuning=tuple(each.site for each in words if each.place != "mid" and each.divisor == divisor),
        guidance=tuple(each.site for each in placed if each.place == "mid" or each in shapes),
        shapes=tuple(each.site for each in shapes),
    )


def _blocks(unet: Any) -> Iterator[tuple[Place, int, int, str, Any]]:
    """Yield (place, number, divisor, path, block) in order of execution; blocks resample after attention."""
    divisor = 1
    for number, block in enumerate(unet.down_blocks):
        yield "down", number, divisor, f"down_blocks.{number}", block
        if block.downsamplers is not None:
            divisor *= 2
    if unet.mid_block is not None:
        yield "mid", 0, divisor, "mid_block", unet.mid_block
    for number, block in enumerate(unet.up_blocks):
        yield "up", number, divisor, f"up_blocks.{number}", block
        if block.upsamplers is not None:
            divisor //= 2
