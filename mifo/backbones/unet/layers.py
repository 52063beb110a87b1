"""Which attention layers a U-Net has, in order of execution, and which of them the method reads.

On Stable Diffusion 1.x and 2.x, of four levels, there are 32 layers (self, then cross, in each block), 16 of
them cross-attention: down 0–5, mid 6, up 7–15. Elsewhere the same layers are found by place and resolution.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mifo.errors import MifoError

Place = Literal["down", "mid", "up"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a U-Net.

    Attributes:
        index: place in the order of execution among all attention layers, from 0.
        name: path of the module in the U-Net, such as "mid_block.attentions.0.transformer_blocks.0.attn1".
        kind: "self" if the keys are the pixels, "cross" if they are the prompt's tokens.
        place: part of the U-Net.
        block: number of the block within its place.
        divisor: side of the latent divided by the side of the layer's map.
        cross_index: place in the order of execution among cross-attention layers, `None` for self-attention.
    """

    index: int
    name: str
    kind: Literal["self", "cross"]
    place: Place
    block: int
    divisor: int
    cross_index: int | None


@dataclass(frozen=True)
class LayerChoice:
    """The layers that each part of the method reads, as `AttentionLayer.index` in order of execution.

    D is the divisor of the first up block with attention. In brackets: Stable Diffusion's numbers (D = 4).

    Attributes:
        semantic: cross layers of the first two up blocks that have attention [cross 7–12].
        finetuning: cross layers of the down and up blocks of divisor D [cross 4, 5, 7, 8, 9].
        guidance: all layers of the mid block and of the first up block that has attention [12–19].
        shapes: all layers of that up block [14–19].
    """

    semantic: tuple[int, ...]
    finetuning: tuple[int, ...]
    guidance: tuple[int, ...]
    shapes: tuple[int, ...]


def attention_layers(unet: nn.Module) -> tuple[AttentionLayer, ...]:
    """List the attention layers of a diffusers `UNet2DConditionModel` in order of execution.

    Raises:
        MifoError: an attention layer lies outside the transformer blocks, so that its place is not known.
    """
    layers: list[AttentionLayer] = []
    for place, number, divisor, path, block in _blocks(unet):
        for transformer, attention in enumerate(getattr(block, "attentions", None) or ()):
            for inner, transformer_block in enumerate(getattr(attention, "transformer_blocks", ())):
                for attribute in ("attn1", "attn2"):
                    if (module := getattr(transformer_block, attribute)) is None:
                        continue
                    cross = module.is_cross_attention
                    layers.append(
                        AttentionLayer(
                            index=len(layers),
                            name=f"{path}.attentions.{transformer}.transformer_blocks.{inner}.{attribute}",
                            kind="cross" if cross else "self",
                            place=place,
                            block=number,
                            divisor=divisor,
                            cross_index=sum(layer.kind == "cross" for layer in layers) if cross else None,
                        )
                    )
    unknown = {name.removesuffix(".processor") for name in unet.attn_processors} - {
        layer.name for layer in layers
    }
    if unknown:
        raise MifoError(
            f"The U-Net's attention layer {min(unknown)} is not part of a transformer block; "
            "use a U-Net whose blocks are CrossAttnDownBlock2D, CrossAttnUpBlock2D and their kin."
        )
    return tuple(layers)


def choose_layers(unet: nn.Module) -> LayerChoice:
    """Choose by place and relative resolution the layers that the method reads.

    Raises:
        MifoError: no up block has cross-attention.
    """
    layers = attention_layers(unet)
    up_blocks = sorted({layer.block for layer in layers if layer.place == "up" and layer.kind == "cross"})
    if not up_blocks:
        raise MifoError(
            "The U-Net has no cross-attention in its up blocks, where the words' maps are read; "
            "use a text-to-image U-Net such as Stable Diffusion's."
        )
    shapes = [layer for layer in layers if layer.place == "up" and layer.block == up_blocks[0]]
    return LayerChoice(
        semantic=tuple(
            layer.index
            for layer in layers
            if layer.kind == "cross" and layer.place == "up" and layer.block in up_blocks[:2]
        ),
        finetuning=tuple(
            layer.index
            for layer in layers
            if layer.kind == "cross" and layer.place != "mid" and layer.divisor == shapes[0].divisor
        ),
        guidance=tuple(layer.index for layer in layers if layer.place == "mid" or layer in shapes),
        shapes=tuple(layer.index for layer in shapes),
    )


def _blocks(unet: nn.Module) -> Iterator[tuple[Place, int, int, str, nn.Module]]:
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
