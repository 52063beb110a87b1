"""The miniature's ViT, the judge of identity: two views are as similar as what they show looks alike.

Instance discrimination with InfoNCE (van den Oord et al., arXiv 1807.03748), but its targets are soft: the
cosine of two instances is to be their likeness, 1 for the same one and 0 for things that have nothing in
common. So a picture that gets a detail wrong loses a little and not everything, as with DINO on photographs.
A batch holds many instances of few categories and siblings that differ in little; one view stands on black,
as references do, the others are box crops of new scenes. Views are mirrored, bent, repainted and softened a
little, as made pictures are. It shares no weight with the generator or with the CLIP.
"""

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from mifo.miniature.pretraining.augmentation import repaint, soften, warp
from mifo.miniature.pretraining.clip import normalise
from mifo.miniature.pretraining.corpus import crowd, draw_views, portraits, with_siblings
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.miniature.pretraining.training import Pretraining
from mifo.world.scenes import SIZE
from mifo.world.vocabulary import THINGS

VIEWS = 5
"""Views of each instance: the first on black, the others cut out of scenes."""

TEMPERATURE = 0.07

LIKENESS = 0.12
"""Difference of two portraits, root mean square of 16×16 colours in [0, 1], at which likeness is 1/e."""


def likeness(portraits: Tensor) -> Tensor:
    """exp(−(d / LIKENESS)²) of all pairs of portraits (n, 3, S, S): (n, n) in (0, 1], 1 for the same."""
    coarse = F.adaptive_avg_pool2d(portraits, 16).flatten(1)
    return (-torch.cdist(coarse, coarse).square() / coarse.shape[1] / LIKENESS**2).exp()


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
    """Cosines between two views, over a batch of look-alikes, learn their likeness."""

    part = "vit"

    def __init__(self, settings: PretrainSettings, device: torch.device) -> None:
        super().__init__(build_vit(), settings.vit, settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed + 17)
        self.instances = max(len(THINGS) * 8, settings.scenes // VIEWS)
        self.crowd = with_siblings(crowd(self.instances, generator), generator)
        self.portraits = (portraits(self.crowd) * 255).round().to(torch.uint8)
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
        cosines = a @ b.T
        target = likeness(self.portraits[rows].float() / 255)
        contrast = _soft_cross_entropy(cosines, target) + _soft_cross_entropy(cosines.T, target.T)
        apart = F.mse_loss(cosines, target)
        hits = rows[cosines.argmax(1)] == rows
        return {"loss": contrast / 2 + 10 * apart, "error": apart.sqrt(), "top1": hits.float().mean()}


def _soft_cross_entropy(cosines: Tensor, target: Tensor) -> Tensor:
    """Least, up to a constant, where the cosines equal their targets."""
    return F.cross_entropy(cosines / TEMPERATURE, (target / TEMPERATURE).softmax(1))
