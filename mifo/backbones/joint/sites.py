"""The sites of a transformer of joint attention in order of execution, and those that are read by default.

A joint layer attends once over pixels and words, which is two sites of one name. All sites have the size of
the grid of patches.
"""

from collections.abc import Iterable

from mifo.method.backbone import DefaultSites, Kind, Site

JOINT: tuple[Kind, ...] = ("words", "pixels")
PIXELS: tuple[Kind, ...] = ("pixels",)


def joint_sites(layers: Iterable[tuple[str, tuple[Kind, ...]]], side: int) -> tuple[Site, ...]:
    """The sites of layers in order of execution, each given by its module's path and `JOINT` or `PIXELS`."""
    pairs = [(name, kind) for name, kinds in layers for kind in kinds]
    return tuple(Site(number, *pair, (side, side)) for number, pair in enumerate(pairs))


def choose_sites(sites: tuple[Site, ...]) -> DefaultSites:
    """The joint attention of the blocks in the middle, where words have found their pixels.

    As many are read as on Stable Diffusion's U-Net, so that the weights of the losses mean the same: 6 blocks
    in semantic learning, 5 in fine-tuning, 4 for guidance and 3 for shapes, or all if there are fewer.
    """
    joint = [site.name for site in sites if site.kind == "words"]

    def central(count: int, *kinds: Kind) -> tuple[Site, ...]:
        first = max(0, (len(joint) - count) // 2)
        names = set(joint[first : first + count])
        return tuple(site for site in sites if site.name in names and site.kind in kinds)

    return DefaultSites(
        semantic=central(6, "words"),
        finetuning=central(5, "words"),
        guidance=central(4, *JOINT),
        shapes=central(3, *JOINT),
    )
