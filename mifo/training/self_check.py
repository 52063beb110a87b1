"""The first step of a stage, before which attention is compared with dense attention."""

from contextlib import nullcontext

import torch
from lightning import Callback, Trainer

from mifo.data.learning_data import LearningBatch
from mifo.method.prompts.instances import find_instances
from mifo.method.regions.rules import SubjectWords, region_rules
from mifo.training.stages import LearningStage


class AttentionCheck(Callback):
    """Ends a run before its first step where maps are wrong or attention ignores the rules of boxes."""

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LearningStage, batch: LearningBatch, batch_index: int
    ) -> None:
        if trainer.global_step:
            return
        model, tokens = pl_module.model, pl_module.instances.tokens[:2]
        prompt = f"a photo of {' and '.join(tokens)}"
        words = find_instances(prompt, tokens, model.words)

        def halves(size: tuple[int, int]) -> torch.Tensor:
            left = torch.arange(size[1], device=model.device) < max(1, size[1] // 3)
            shapes = torch.stack([left, left.flip(0)])[: len(tokens)]  # the background is between
            return shapes[None, :, None].expand(1, -1, *size)

        places = SubjectWords.of(list(words.subjects.values()), words, model.device)
        sizes = {site.size for site in model.sites}
        rules = region_rules(halves, sizes, places, guidance=True)
        noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        passes_in = pl_module.passes_in
        rounded = torch.autocast(model.device.type, passes_in) if passes_in else nullcontext()
        with trainer.precision_plugin.forward_context(), rounded:
            conditioning = model.encode(model.tokenize([prompt]))
            time = batch.inputs.times[:1].to(model.device)
            reads = pl_module.timeline.sites or model.default_sites.semantic
            model.check_attention(noise.to(model.device), time, conditioning, reads, rules)
