"""The sites of a diffusers `SD3Transformer2DModel` in order of execution, and those that are read by default.

Each joint block attends once over pixels and words, which is two sites of one name; Stable Diffusion 3.5's
first blocks then attend a second time, among pixels alone. All sites have the size of the grid of patches.
"""

from typing import Any

from mifo.method.backbone import DefaultSites, Kind, Site


def network_sites(transformer: Any) -> tuple[Site, ...]:
    """The sites of all blocks in order of execution."""
    side = transformer.config.sample_size // transformer.config.patch_size
    found: list[Site] = []
    for number, block in enumerate(transformer.transformer_blocks):
        kinds: list[tuple[str, Kind]] = [("attn", "words"), ("attn", "pixels")]
        if block.attn2 is not None:
            kinds.append(("attn2", "pixels"))
        for name, kind in kinds:
            found.append(Site(len(found), f"transformer_blocks.{number}.{name}", kind, (side, side)))
    return tuple(found)


def choose_sites(sites: tuple[Site, ...], depth: int) -> DefaultSites:
    """The joint attention of the blocks in the middle, where words have found their pixels.

    As many are read as on Stable Diffusion's U-Net, so that the weights of the losses mean the same: 6 blocks
    in semantic learning, 5 in fine-tuning, 4 for guidance and 3 for shapes, or all if there are fewer.
    """

    def central(count: int, *kinds: Kind) -> tuple[Site, ...]:
        first = max(0, (depth - count) // 2)
        names = {f"transformer_blocks.{number}.attn" for number in range(first, first + count)}
        return tuple(site for site in sites if site.name in names and site.kind in kinds)

    return DefaultSites(
        semantic=central(6, "words"),
        finetuning=central(5, "words"),
        guidance=central(4, "words", "pixels"),
        shapes=central(3, "words", "pixels"),
    )
