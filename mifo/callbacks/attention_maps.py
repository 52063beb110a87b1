"""Where each word looks."""

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F

from mifo.backbones.images import encode_images
from mifo.backbones.text import encode_prompts
from mifo.backbones.unet.layers import attention_layers, choose_layers
from mifo.backbones.unet.recording import AttentionRecorder
from mifo.callbacks.logging import is_due, log_image, log_values, steps_between
from mifo.method.diffusion.noise_schedule import NoiseSchedule
from mifo.report.attention_panel import draw_attention
from mifo.training.stages import LearningStage


class AttentionMaps(Callback):
    """Draws the cross-attention map of each token per layer over the source image.

    It does so every `every` steps and at the end of a stage, and logs the share of each token's attention
    in its mask, Σ A·M / Σ A, per layer and over all layers: 1 = the word looks at its instance only. The
    image carries the same noise at the same `timestep` each time.
    """

    def __init__(self, every: int = 100, timestep: int = 250, seed: int = 0) -> None:
        self.every, self.timestep, self.seed = steps_between(every), timestep, seed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LearningStage, outputs, batch, batch_index: int
    ) -> None:
        if not is_due(trainer, self.every):
            return
        model, instances = pl_module.model, pl_module.instances
        image, masks = instances.resized(model.image_size)
        maps = self._maps(pl_module, image)
        cross = {layer.index: layer.cross_index for layer in attention_layers(model.unet)}
        named = {f"layer {cross[index]}": each for index, each in maps.items()}
        shares = torch.stack([attention_in_mask(each, masks) for each in named.values()])  # (layers, N)
        values = {}
        for column, token in zip(shares.T, instances.tokens, strict=True):
            values[token] = column.mean()
            values |= {f"{token}/{name}": share for name, share in zip(named, column, strict=True)}
        log_values(trainer, pl_module, "attention_in_mask", values)
        log_image(trainer, pl_module, "attention_maps", draw_attention(image, masks, instances.tokens, named))

    @torch.no_grad()
    def _maps(self, module: LearningStage, image: Tensor) -> dict[int, Tensor]:
        """Maps (N, R, R) by layer of one noisy forward pass with all instances in the prompt."""
        model, tokens = module.model, module.instances.tokens
        schedule = NoiseSchedule.from_scheduler(model.noise_scheduler, model.device)
        latents = encode_images(model, image[None].to(model.device))[0]
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.tensor([self.timestep], device=latents.device)
        prompt = f"a photo of {' and '.join(tokens)}"
        ids = model.tokenizer(prompt).input_ids
        places = [ids.index(model.tokenizer.convert_tokens_to_ids(token)) for token in tokens]
        positions = torch.tensor([places], device=latents.device)
        with AttentionRecorder(model.unet, choose_layers(model.unet).semantic, positions) as recorder:
            model.unet(
                schedule.add_noise(latents, noise, timesteps), timesteps, encode_prompts(model, [prompt])
            )
        sides = {layer: round(each.shape[1] ** 0.5) for layer, each in recorder.probabilities.items()}
        return {
            layer: each[0].T.unflatten(1, (sides[layer], -1)).float().cpu()
            for layer, each in recorder.probabilities.items()
        }


def attention_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Return Σ A·M / Σ A for maps (N, R, R) and masks (N, H, W): (N,) in [0, 1]."""
    small = F.interpolate(masks[None].to(maps), maps.shape[-2:], mode="bilinear")[0]
    return (maps * small).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp_min(1e-12)
