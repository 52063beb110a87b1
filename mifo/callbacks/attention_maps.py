"""Where each word looks."""

import torch
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F

from mifo.callbacks.logging import Periodic, log_image, log_values
from mifo.method.backbone import Site
from mifo.method.objective import word_maps
from mifo.report.attention_panel import draw_attention
from mifo.training.stages import LearningStage


class AttentionMaps(Periodic):
    """Draws the cross-attention map of each token per layer over the source image.

    It does so every `every` steps and at the end of a stage, and logs the share of each token's attention
    in its mask, Σ A·M / Σ A, per layer and over all layers: 1 = the word looks at its instance only. The
    image carries the same noise at the same `timestep` each time.
    """

    def __init__(self, every: int = 100, timestep: int = 250, seed: int = 0) -> None:
        super().__init__(every)
        self.timestep, self.seed = timestep, seed

    def look(self, trainer: Trainer, module: LearningStage) -> None:
        model, instances = module.model, module.instances
        image, masks = instances.resized(model.image_size)
        words = [site for site in model.sites if site.kind == "words"]
        named = {f"layer {words.index(site)}": each for site, each in self._maps(module, image).items()}
        shares = torch.stack([attention_in_mask(each, masks) for each in named.values()])  # (layers, N)
        values = {}
        for column, token in zip(shares.T, instances.tokens, strict=True):
            values[token] = column.mean()
            values |= {f"{token}/{name}": share for name, share in zip(named, column, strict=True)}
        log_values(trainer, module, "attention_in_mask", values)
        log_image(trainer, module, "attention_maps", draw_attention(image, masks, instances.tokens, named))

    @torch.no_grad()
    def _maps(self, module: LearningStage, image: Tensor) -> dict[Site, Tensor]:
        """Maps (N, h, w) by site of one noisy pass with all instances in the prompt."""
        model, tokens = module.model, module.instances.tokens
        latents = model.encode_images([image])[0]
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        times = torch.tensor([self.timestep], device=latents.device)
        ids = model.tokenize([f"a photo of {' and '.join(tokens)}"])
        positions = torch.stack([model.places(ids[0], token)[0] for token in tokens])[None].to(latents.device)
        read = word_maps(positions)
        reads = dict.fromkeys(model.default_sites.semantic, read)
        noisy = model.process.add_noise(latents, noise, times)
        _, maps = model.predict(noisy, times, model.encode(ids), reads)
        return {site: each[0].T.unflatten(1, site.size).float().cpu() for site, each in maps.items()}


def attention_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Return Σ A·M / Σ A for maps (N, R, R) and masks (N, H, W): (N,) in [0, 1]."""
    small = F.interpolate(masks[None].to(maps), maps.shape[-2:], mode="bilinear")[0]
    return (maps * small).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp_min(1e-12)
