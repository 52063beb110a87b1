"""The sites chosen on Stable Diffusion's topology, on the miniature's and on shapes that have none."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from mifo.backbones.unet.sites import choose_sites, network_sites
from mifo.errors import MifoError
from mifo.method.backbone import Site

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def build_unet(down: list[str], up: list[str], **options: object) -> UNet2DConditionModel:
    """A small U-Net with random weights; two residual blocks a level as in Stable Diffusion."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8,) * len(down),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
        **options,
    )


def stable_diffusion_unet(**options: object) -> UNet2DConditionModel:
    return build_unet([CROSS_DOWN] * 3 + ["DownBlock2D"], ["UpBlock2D"] + [CROSS_UP] * 3, **options)


def cross_numbers(unet: UNet2DConditionModel, chosen: tuple[Site, ...]) -> list[int]:
    words = [each.site for each in network_sites(unet) if each.site.kind == "words"]
    return [words.index(site) for site in chosen]


def indices(chosen: tuple[Site, ...]) -> tuple[int, ...]:
    return tuple(site.index for site in chosen)


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_stable_diffusion_gets_the_numbers_of_the_paper_after_a_reload(linear, tmp_path):
    stable_diffusion_unet(use_linear_projection=linear).save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path)
    choice = choose_sites(network_sites(unet))
    assert len(network_sites(unet)) == 32
    assert cross_numbers(unet, choice.semantic) == [7, 8, 9, 10, 11, 12]
    assert cross_numbers(unet, choice.finetuning) == [4, 5, 7, 8, 9]
    assert indices(choice.guidance) == tuple(range(12, 20))
    assert indices(choice.shapes) == tuple(range(14, 20))


def test_three_levels_get_the_same_layers_by_place_and_resolution():
    unet = build_unet([CROSS_DOWN, CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP, CROSS_UP])
    placed = network_sites(unet)
    choice = choose_sites(placed)
    assert cross_numbers(unet, choice.semantic) == [5, 6, 7, 8, 9, 10]
    assert cross_numbers(unet, choice.finetuning) == [2, 3, 5, 6, 7]
    assert {placed[site.index].divisor for site in choice.finetuning} == {2}
    assert {site.size for site in choice.finetuning} == {(8, 8)}
    assert [placed[site.index].place for site in choice.guidance] == ["mid"] * 2 + ["up"] * 6
    assert choice.shapes == choice.guidance[2:]


def test_sites_are_listed_as_they_run_with_the_sizes_of_their_maps(vector_unet):
    sites, seen = [each.site for each in network_sites(vector_unet)], []
    for site in sites:
        module = vector_unet.get_submodule(site.name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, site=site: seen.append(
                (
                    site.index,
                    args[0].shape[1],
                    "words" if kwargs["encoder_hidden_states"] is not None else "pixels",
                )
            ),
            with_kwargs=True,
        )
    vector_unet(torch.zeros(1, 4, 32, 32), 0, torch.zeros(1, 77, 32))
    assert seen == [(site.index, site.size[0] * site.size[1], site.kind) for site in sites]
    for each in network_sites(vector_unet):
        assert each.site.size == (32 // each.divisor, 32 // each.divisor)


def test_several_transformers_in_a_block_are_counted_in_order():
    unet = build_unet([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP], transformer_layers_per_block=2)
    kinds = [each.site.kind for each in network_sites(unet)]
    assert kinds == ["pixels", "words"] * (len(kinds) // 2)
    assert len(kinds) == 2 * 2 * (2 + 1 + 3)


def test_cross_attention_before_the_mid_block_only_is_refused():
    unet = build_unet([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", "UpBlock2D"])
    with pytest.raises(MifoError, match="no cross-attention in its up blocks"):
        choose_sites(network_sites(unet))


def test_attention_of_another_kind_is_refused():
    unet = build_unet(["AttnDownBlock2D", CROSS_DOWN], [CROSS_UP, "UpBlock2D"])
    with pytest.raises(MifoError, match="not part of a transformer block"):
        network_sites(unet)
