"""The miniature's ViT, the judge of identity: the same instance in two scenes is drawn together, others
apart.

Instance discrimination with InfoNCE (van den Oord et al., arXiv 1807.03748). A batch holds many instances of
few categories, so that the negatives are look-alikes; one view stands on black, as references do, the others
are box crops of new scenes. Views are mirrored, bent, repainted and softened a little, as made pictures are.
It shares no weight with the generator or with the CLIP.
"""

from __future__ import annotations

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from mifo.miniature.pretraining.augmentation import repaint, soften, warp
from mifo.miniature.pretraining.clip import normalise
from mifo.miniature.pretraining.corpus import crowd, draw_views
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.miniature.scenes import SIZE
from mifo.miniature.vocabulary import THINGS

VIEWS = 5
"""Views of each instance: the first on black, the others cut out of scenes."""

TEMPERATURE = 0.07


def build_vit() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=SIZE,
            patch_size=16,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
        ),
        add_pooling_layer=False,
    )


class VitPretraining(Pretraining):
    """InfoNCE between two views, over a batch of look-alikes."""

    part = "vit"

    def __init__(self, settings: PretrainSettings, device: torch.device) -> None:
        super().__init__(build_vit(), settings.vit, settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed + 17)
        self.instances = max(len(THINGS) * 8, settings.scenes // VIEWS)
        self.crowd = crowd(self.instances, generator)
        index = torch.arange(self.instances, device=device)
        self.views = torch.stack(
            [
                draw_views(self.crowd, index, generator, on_black=view == 0)
                for view in track(range(VIEWS), "drawing views")
            ],
            1,
        )

    def disturb(self, views: Tensor, generator: torch.Generator) -> Tensor:
        return soften(repaint(warp(views, generator), generator), generator)

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        device, n = self.device, self.settings.batch_size
        # The crowd is sorted by category, so a short window of it holds look-alikes; four windows a batch.
        window = n // 4
        starts = torch.randint(self.instances - window, (4, 1), generator=generator, device=device)
        rows = (starts + torch.arange(window, device=device)).flatten()
        order = torch.rand(n, VIEWS, generator=generator, device=device).argsort(1)[:, :2]
        first, second = (
            normalise(self.disturb(self.views[rows, order[:, i]].float() / 255, generator)) for i in range(2)
        )
        features = self.network(pixel_values=torch.cat([first, second])).last_hidden_state[:, 0].float()
        a, b = F.normalize(features, dim=-1).chunk(2)
        logits = a @ b.T / TEMPERATURE
        target = rows.unsqueeze(1) == rows.unsqueeze(0)
        target = target.float() / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hits = target.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean()
        return {"loss": loss, "top1": hits}
