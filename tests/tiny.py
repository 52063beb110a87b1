"""A random diffusers pipeline, saved the way Stable Diffusion is, and an evaluator: small for every test."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2Processor,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mifo.backbones.latent import LatentModel
from mifo.benchmark.shapes import TEMPLATE
from mifo.data.instances import InstanceSet
from mifo.data.settings import PriorSettings
from mifo.metrics.scores import Evaluator
from mifo.training.settings import LearningSettings, StageSettings, constant

WORDS = """
    a an the photo picture of and or in on at with to left right top bottom red green blue striped car cat mug
    lizard thing beach jungle snow street city wooden floor
""".split()


def tiny_tokenizer(length: int = 32, **special: str) -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` whole and spells every other lower-case word."""
    letters = [chr(code) for code in range(33, 127)]
    pieces, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        joined = symbols[0]
        for symbol in symbols[1:]:
            if (joined, symbol) not in merges:
                merges.append((joined, symbol))
                pieces.append(joined + symbol)
            joined += symbol
    vocabulary = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)},
        merges=merges,
        model_max_length=length,
        **special,
    )


def tiny_pipeline(folder: Path | str, seed: int = 0) -> Path:
    """Save a tiny random pipeline into `folder`: images 32×32, latents 16×16×4, text width 16, prompts of 32.

    The U-Net has the miniature's three levels, two with attention, so that layers are chosen as on it.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder, vae = CLIPTextModel(_text_config(tokenizer, 16)), _vae()
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, _scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sdxl_pipeline(folder: Path | str, depths: tuple[int, int] = (2, 10)) -> Path:
    """Save a tiny random Stable Diffusion XL into `folder`: images 64×64, latents 32×32×4, prompts of 32.

    Its U-Net has XL's levels, and unless `depths` says otherwise XL's depths: no attention at the first
    level, then 2 and 10 transformer blocks.
    """
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        transformer_layers_per_block=(1, *depths),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionXLPipeline(
        _vae(),
        CLIPTextModel(_text_config(tokenizer, 16)),
        # as published: an end that is not the tokenizer's
        CLIPTextModelWithProjection(_text_config(tokenizer_2, 24, eos_token_id=2)),
        tokenizer,
        tokenizer_2,
        unet,
        _scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sd3_pipeline(folder: Path | str, t5: bool = True, third: bool = False) -> Path:
    """Save a tiny random Stable Diffusion 3.5 into `folder`: images 32×32, latents 16×16×4, prompts of 32.

    Its transformer has 3 joint blocks on 8×8 patches, of which the first attends twice, and normed queries
    and keys. Without `t5` it reads no wider states than those of the two CLIP encoders. With
    a `third` encoder the folder holds T5.
    """
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(chr(code), -9.0) for code in range(33, 127)]
    tokenizer_3 = T5Tokenizer(vocab=pieces, extra_ids=0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64 if t5 else 40,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():  # norms of zeros would hide words from pixels
        if "norm" in name and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1 if "weight" in name else 0, 0.3)
    vae = _vae()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    pipeline = StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        # as published: an end that is not the tokenizer's
        CLIPTextModelWithProjection(_text_config(tokenizer, 16, eos_token_id=2)),
        tokenizer,
        CLIPTextModelWithProjection(_text_config(tokenizer_2, 24, eos_token_id=2)),
        tokenizer_2,
        _t5(len(tokenizer_3)) if third else None,
        tokenizer_3 if third else None,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer as Qwen3's that knows `WORDS` whole, behind a blank too, and spells all others."""
    pieces, merges = sorted(ByteLevel.alphabet()), []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
        merges.append(("Ġ", word))
        pieces.append(f"Ġ{word}")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate([*pieces, *special])},
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=special[1:2],
        chat_template=TEMPLATE,
    )


def tiny_qwen(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3ForCausalLM:
    """Qwen3 of width 16, with rows of its table that the tokenizer does not use, as the published one."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 5,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


def tiny_flux2_pipeline(folder: Path | str, distilled: bool = True, embedded: bool = False) -> Path:
    """Save a tiny random FLUX.2 [klein] into `folder`: images 32×32, latents 8×8×16.

    Its transformer has 2 blocks of two streams and 3 of one; `embedded`: it reads a strength of guidance.
    """
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=embedded,
    )
    vae = _vae(AutoencoderKLFlux2)
    torch.nn.init.normal_(vae.bn.running_mean, 0, 0.3)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    pipeline = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae,
        tiny_qwen(tokenizer, 28),
        tokenizer,
        transformer,
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_z_image_pipeline(folder: Path | str, **scheduler: float | bool) -> Path:
    """Save a tiny random Z-Image into `folder`: images 32×32, latents 16×16×4, 8×8 patches.

    Its transformer has one layer of pixels alone, one of words alone, and 3 of both.
    """
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name), 0, 0.3)
    vae = _vae()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae,
        tiny_qwen(tokenizer, 3),
        tokenizer,
        transformer,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _t5(rows: int) -> T5EncoderModel:
    """T5 of width 64 with rows that its tokenizer does not use, as the published one has them."""
    return T5EncoderModel(
        T5Config(d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=rows + 5)
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, **others: int) -> CLIPTextConfig:
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        **ends | others,
    )


def _vae(kind: Any = AutoencoderKL) -> Any:
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def two_instances() -> InstanceSet:
    """A car and a cat in an image of noise, 32 pixels wide and high; the cat has no initializer word."""
    masks = torch.zeros(2, 32, 32)
    masks[0, 4:20, 2:14] = 1
    masks[1, 10:30, 16:30] = 1
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InstanceSet("two", image, masks, ("car", "cat"), ("car", None), ("<asset0>", "<asset1>"))


def a_step_of_each(what: str, prior: Path) -> LearningSettings:
    """One step of a stage each, with a class picture; of words alone no second one."""
    rate = {"learning_rate": 1e-2, "lr_scheduler": constant()}
    return LearningSettings(
        semantic=StageSettings(steps=1),
        finetuning=StageSettings(steps=0 if what == "tokens" else 1, trainable=what, **rate),
        prior=PriorSettings(pictures=1, steps=1, cache=str(prior)),
    )


def moved_weights(base: LatentModel, model: LatentModel) -> dict[str, set[str]]:
    """By part, the weights that differ; what one of the models alone has is left out."""
    moved = {}
    for part, network in base.networks.items():
        now = dict(model.networks[part].named_parameters())
        moved[part] = {
            name.removeprefix("text_model.")
            for name, weight in network.named_parameters()
            if name in now and not torch.equal(weight, now[name])
        }
    return moved


class MeanColour:
    """A stand-in evaluator: a picture's mean colour; all texts are grey."""

    evaluator = Evaluator("colour", "0" * 12)

    def encode_images(self, images):
        return torch.stack([image.mean(dim=(1, 2)) for image in images])

    def encode_texts(self, texts):
        return torch.ones(len(texts), 3)

    def warnings(self, texts):
        return []


def instances_of(
    source: torch.Tensor, masks: torch.Tensor, class_names: tuple[str | None, ...]
) -> InstanceSet:
    """Instances of a picture (3, H, W) and masks (N, H, W), both in [0, 1]."""
    tokens = tuple(f"<asset{i}>" for i in range(len(masks)))
    image = (source * 255).round().byte()
    return InstanceSet("drawn", image, masks, class_names, (None,) * len(masks), tokens)


def small_road(source, photo, prior):
    """The words of a short `mifo run` with adapters and a prior, in the folder run, on bfloat16 weights."""
    return [
        *("run", "model=local", f"model.source={source}", "debug=default", "metrics=none", "instances=local"),
        *(f"instances.folder={photo}", "instances.class_names=[car,cat]", "hydra.run.dir=run"),
        *("performance=low_vram", "learning.finetuning.learning_rate=1e-3", f"learning.prior.cache={prior}"),
        *("learning.semantic.steps=2", "learning.finetuning.steps=1"),
        *("learning.prior.pictures=1", "learning.prior.steps=1"),
        *("synthesis.steps=2", "guidance.shapes_from=1"),
    ]


def tiny_segmenter(folder: Path) -> Path:
    """Write a tiny Segment Anything 2 with random weights, as transformers saves it."""
    torch.manual_seed(0)
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        window_positional_embedding_background_size=[2, 2],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    prompts = Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16, mask_input_channels=8)
    decoder = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    Sam2Model(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    Sam2Processor(Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})).save_pretrained(
        folder
    )
    return folder
