"""The layers chosen on Stable Diffusion's topology, on the miniature's and on shapes that have none."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from mifo.backbones.unet.layers import attention_layers, choose_layers

from mifo.errors import MifoError

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


def cross_numbers(unet: UNet2DConditionModel, chosen: tuple[int, ...]) -> list[int | None]:
    layers = attention_layers(unet)
    return [layers[index].cross_index for index in chosen]


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_stable_diffusion_gets_the_numbers_of_the_paper_after_a_reload(linear, tmp_path):
    stable_diffusion_unet(use_linear_projection=linear).save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path)
    choice = choose_layers(unet)
    assert len(attention_layers(unet)) == 32
    assert cross_numbers(unet, choice.semantic) == [7, 8, 9, 10, 11, 12]
    assert cross_numbers(unet, choice.finetuning) == [4, 5, 7, 8, 9]
    assert choice.guidance == tuple(range(12, 20))
    assert choice.shapes == tuple(range(14, 20))


def test_three_levels_get_the_same_layers_by_place_and_resolution():
    unet = build_unet([CROSS_DOWN, CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP, CROSS_UP])
    layers, choice = attention_layers(unet), choose_layers(unet)
    assert cross_numbers(unet, choice.semantic) == [5, 6, 7, 8, 9, 10]
    assert cross_numbers(unet, choice.finetuning) == [2, 3, 5, 6, 7]
    assert {layers[index].divisor for index in choice.finetuning} == {2}
    assert [layers[index].place for index in choice.guidance] == ["mid"] * 2 + ["up"] * 6
    assert choice.shapes == choice.guidance[2:]


def test_layers_are_listed_as_they_run_with_the_sides_of_their_maps(vector_unet):
    layers, seen = attention_layers(vector_unet), []
    for layer in layers:
        module = vector_unet.get_submodule(layer.name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen.append(
                (
                    layer.index,
                    args[0].shape[1],
                    "cross" if kwargs["encoder_hidden_states"] is not None else "self",
                )
            ),
            with_kwargs=True,
        )
    vector_unet(torch.zeros(1, 4, 32, 32), 0, torch.zeros(1, 77, 32))
    assert seen == [(layer.index, (32 // layer.divisor) ** 2, layer.kind) for layer in layers]


def test_several_transformers_in_a_block_are_counted_in_order():
    unet = build_unet([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", CROSS_UP], transformer_layers_per_block=2)
    kinds = [layer.kind for layer in attention_layers(unet)]
    assert kinds == ["self", "cross"] * (len(kinds) // 2)
    assert len(kinds) == 2 * 2 * (2 + 1 + 3)


def test_cross_attention_before_the_mid_block_only_is_refused():
    unet = build_unet([CROSS_DOWN, "DownBlock2D"], ["UpBlock2D", "UpBlock2D"])
    with pytest.raises(MifoError, match="no cross-attention in its up blocks"):
        choose_layers(unet)


def test_attention_of_another_kind_is_refused():
    unet = build_unet(["AttnDownBlock2D", CROSS_DOWN], [CROSS_UP, "UpBlock2D"])
    with pytest.raises(MifoError, match="not part of a transformer block"):
        attention_layers(unet)
