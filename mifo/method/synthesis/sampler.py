"""The whole synthesis loop: sampling with masked attention, latent guidance by boxes, and renewed shapes.

MIFO (arXiv 2511.00542), which builds on Bounded Attention (arXiv 2403.16990).

Letters: B samples, S subjects, L tokens of the prompt, n = R² pixels of the sites that give the shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mifo.errors import MifoError
from mifo.method.backbone import Backbone, Conditioning, Kind, Rules, Site
from mifo.method.guidance.descent import descend, loss_and_gradient
from mifo.method.guidance.loss import attention_sums
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.prompts.instances import PromptTokens
from mifo.method.regions.boxes import check_boxes, inner_box
from mifo.method.regions.grids import rasterise_boxes, resize_shapes
from mifo.method.regions.renewal import renew_shapes
from mifo.method.regions.rules import MOST_SUBJECTS, SubjectWords, region_rules
from mifo.method.synthesis.settings import SynthesisSettings

Accelerate = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Turns a function into a faster one; the result of a call may be overwritten by the next call."""


@dataclass(frozen=True)
class StepReport:
    """Where a synthesis stands after a denoising step."""

    timestep: float  # of the noise process
    latents: Tensor  # (B, C, h, w) after the step
    shapes: Tensor | None  # bool (B, S, R, R) in force during the step, None without boxes
    losses: Tensor  # guidance loss per sample and subject of each iteration, on the latents' device


class Sampler:
    """Samples latents of one prompt after the other, with boxes or without, on one model."""

    def __init__(
        self,
        backbone: Backbone,
        settings: SynthesisSettings,
        guidance: GuidanceSettings,
        accelerate: Accelerate = lambda function: function,
    ) -> None:
        """`accelerate` wraps the two functions of tensors, for example in CUDA graphs."""
        self.backbone, self.settings, self.guidance = backbone, settings, guidance
        self.times = backbone.process.times(settings.steps)  # from noise to clean
        self._times = torch.tensor(self.times)
        # unconditional predictions would not count, and are not made
        self.free = settings.guidance_scale == 1
        self.gradient = accelerate(self._loss_and_gradient)
        self.prediction = accelerate(self._prediction_and_maps)

    @cached_property
    def sites(self) -> tuple[Sequence[Site], Sequence[Site]]:
        """See `sites_in_use`."""
        return sites_in_use(self.backbone, self.guidance)

    @torch.no_grad()
    def __call__(
        self,
        conditioning: Conditioning,
        latents: Tensor,
        boxes: Mapping[str, Sequence[float]] | None = None,
        tokens: PromptTokens | None = None,
        seed: int = 0,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> Tensor:
        """Latents in which each subject stands in its box; without boxes this is plain sampling.

        Args:
            conditioning: 2B rows, unconditional ones first.
            latents: (B, C, h, w) standard normal; h = w if there are boxes. Sampling keeps their precision.
            boxes: [x0, y0, x1, y1] in [0, 1] by the name of the subject.
            tokens: where the subjects and the function words stand in the prompt; needed with boxes.
            seed: seeds k-means.
            on_step: called after every step, for progress bars and pictures.

        Returns:
            (B, C, h, w) clean latents.

        Raises:
            MifoError: an impossible box, sites that do not fit, latents that are not square, or numbers of
                rows that disagree; or latents that are not finite after a step.
        """
        if conditioning.samples != 2 * len(latents):
            raise MifoError(
                f"{len(latents)} samples need {2 * len(latents)} rows of conditioning, unconditional first, "
                f"but there are {conditioning.samples}."
            )
        regions = None
        if boxes and tokens:
            if latents.shape[-1] != latents.shape[-2]:
                raise MifoError("Box control needs square pictures: give latents of equal height and width.")
            regions = Regions(self, boxes, tokens, len(latents), latents.device, seed)
        sums = []  # of all latents, which are NaN or infinite where one number is
        for step, time in enumerate(self.times):
            losses = latents.new_zeros(0)
            if regions:
                latents, losses = regions.guide(latents, conditioning, step)
                regions.renew(step)
            latents = self.denoise(latents, conditioning, step, regions)
            sums.append(latents.sum(dtype=torch.float32))
            if on_step:
                shapes = regions.shapes if regions else None
                on_step(StepReport(time, latents, shapes, losses))
        finite = torch.stack(sums).isfinite().tolist()  # waits for the device once
        if not all(finite):
            raise MifoError(
                f"latents are not finite after step {finite.index(False) + 1} of {len(finite)} of synthesis; "
                "take performance.synthesis_precision=float32, or less guidance"
            )
        return latents

    def denoise(
        self, latents: Tensor, conditioning: Conditioning, step: int, regions: "Regions | None" = None
    ) -> Tensor:
        """One sampling step of latents (B, C, h, w), bounded by regions."""
        rules = regions.rules(guidance=False) if regions else None
        leading = regions.words.leading if regions and regions.records else None
        time = self.time(step, latents.device)
        if self.free:
            conditioning = conditioning.rows(slice(len(latents), None))
        guided, maps = self.prediction(latents, time, conditioning, rules, leading)
        if regions:
            regions.add(maps)
        if not self.free:  # classifier-free guidance (arXiv 2207.12598)
            unconditional, conditional = guided.chunk(2)
            guided = unconditional + self.settings.guidance_scale * (conditional - unconditional)
        return self.backbone.process.step(latents, guided, self.times, step)

    def time(self, step: int, device: torch.device) -> Tensor:
        """The time of a step, a scalar; the times go to the device once, since each copy waits for it."""
        self._times = self._times.to(device)
        return self._times[step]

    def _prediction_and_maps(
        self,
        latents: Tensor,
        time: Tensor,
        conditioning: Conditioning,
        rules: Rules | None,
        leading: Tensor | None,
    ) -> tuple[Tensor, dict[Kind, Tensor]]:
        """A prediction for each row of conditioning, in the latents' precision, and mean maps of each kind.

        Maps are read if `leading`, the position (S,) of each subject's leading token, is given: pixels
        (B, n, n) and words (B, n, S), means over heads and sites, conditional half.
        """

        def mean_map(probabilities: Tensor, kind: Kind) -> Tensor:
            mean = probabilities[-len(latents) :].mean(dim=1)
            return mean[..., leading] if kind == "words" else mean

        shaping = () if leading is None else self.sites[1]
        reads = {site: partial(mean_map, kind=site.kind) for site in shaping}
        rows = torch.cat([latents] * (conditioning.samples // len(latents)))
        prediction, maps = self.backbone.predict(rows, time, conditioning, reads or None, rules)
        kinds: tuple[Kind, ...] = ("pixels", "words") if maps else ()
        return prediction.to(latents.dtype), {k: torch.stack(_of_kind(maps, k)).mean(0) for k in kinds}

    def _loss_and_gradient(
        self,
        latents: Tensor,
        time: Tensor,
        alphas: Tensor,
        conditional: Conditioning,
        rules: Rules | None,
        shapes: Mapping[tuple[int, int], Tensor],
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`loss_and_gradient` of the latents by one guidance pass, of the conditional half alone.

        Args:
            shapes: bool (B, S, n) by size. context: bool (1, S, L), the words that the loss reads.
        """
        reads = {}
        for site in self.sites[0]:
            own = shapes[site.size]
            keys = context if site.kind == "words" else own
            reads[site] = partial(attention_sums, shapes=own, context=keys)

        def sums(z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            found = self.backbone.maps(z, time, conditional, reads, rules)
            return _of_kind(found, "words"), _of_kind(found, "pixels")

        return loss_and_gradient(latents, sums, alphas, self.guidance)


class Regions:
    """The regions of one prompt: boxes at first, later the shapes that form inside them.

    In each sampling step, call `guide` and `renew`, then `Sampler.denoise`, in this order.
    """

    def __init__(
        self,
        sampler: Sampler,
        boxes: Mapping[str, Sequence[float]],
        tokens: PromptTokens,
        samples: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """Arguments as for `Sampler.__call__`; `samples` is B. Refuses impossible boxes, and too many."""
        self._sampler, self._guidance, self._seed = sampler, sampler.guidance, seed
        guided, shaping = sampler.sites
        self._guided_sizes = {site.size for site in guided}
        side = shaping[0].size[0]
        if len(boxes) > MOST_SUBJECTS:
            raise MifoError(f"{len(boxes)} boxes are too many: a prompt can have {MOST_SUBJECTS}.")
        check_boxes(boxes, side, self._guidance.margin)
        self.words = SubjectWords.of([tokens.subjects[name] for name in boxes], tokens, device)
        edges = [inner_box(box, self._guidance.margin) for box in boxes.values()]
        self.boxes = rasterise_boxes(edges, side, device)
        self.shapes = self.boxes.expand(samples, -1, -1, -1)  # in force, (B, S, R, R)
        self._shapes_at: Callable[[tuple[int, int]], Tensor] = lambda size: rasterise_boxes(
            edges, size[0], device
        ).expand(samples, -1, -1, -1)
        # whether shapes will be renewed, for which the maps of denoising passes are kept
        self.records = any(self._renews_at(step) for step in range(1, len(sampler.times)))
        self.counter = 0  # readings of the penalty's weight α; set it to go on in the middle of a run
        self.totals: dict[Kind, Tensor] = {}  # sums of the maps over denoising passes
        self.passes = 0  # how many denoising passes these are
        self._centres: Tensor | None = None
        self._rules: dict[bool, Rules] = {}

    def rules(self, guidance: bool) -> Rules | None:
        """The rules of a guidance pass or of a denoising pass, made once for each set of shapes."""
        if not self._guidance.masked:
            return None
        if guidance not in self._rules:
            sizes = {site.size for site in self._sampler.backbone.sites}
            halves = not self._sampler.free
            self._rules[guidance] = region_rules(self._shapes_at, sizes, self.words, guidance, halves)
        return self._rules[guidance]

    def guide(self, latents: Tensor, conditioning: Conditioning, step: int) -> tuple[Tensor, Tensor]:
        """Descend on the guidance loss, if the step is guided: latents (B, C, h, w), losses (iterations,)."""
        if step >= self._guidance.guided_steps:
            return latents, latents.new_zeros(0)
        conditional = conditioning.rows(slice(len(latents), None))
        shapes = {size: self._shapes_at(size).flatten(2) for size in self._guided_sizes}

        def differentiate(z: Tensor, alphas: tuple[float, float]) -> tuple[Tensor, Tensor]:
            loss, gradient = self._sampler.gradient(
                z,
                self._sampler.time(step, z.device),
                torch.tensor(alphas, device=z.device),
                conditional,
                self.rules(guidance=True),
                shapes,
                self.words.context,
            )
            return loss, gradient

        latents, losses, self.counter = descend(latents, differentiate, step, self.counter, self._guidance)
        return latents, losses

    def renew(self, step: int) -> None:
        """Let the shapes that have formed replace the boxes or the last shapes, if it is time."""
        if not self._renews_at(step):
            return
        self.shapes, self._centres = renew_shapes(
            self.totals["pixels"] / self.passes,
            self.totals["words"] / self.passes,
            self.shapes,
            self.boxes,
            self._guidance.clusters_per_subject,
            self._guidance.shape_threshold,
            self._guidance.restarts,
            self._seed,
            self._centres,
        )
        self._shapes_at = lambda size: resize_shapes(self.shapes, size[0])
        self._rules.clear()

    def add(self, maps: Mapping[Kind, Tensor]) -> None:
        """Add the maps of a denoising pass to the running means."""
        for kind, each in maps.items():
            self.totals[kind] = self.totals.get(kind, 0.0) + each
        self.passes += bool(maps)

    def _renews_at(self, step: int) -> bool:
        since = step - self._guidance.shapes_from
        every = self._guidance.shapes_every
        return self._guidance.masked and every > 0 and since >= 0 and since % every == 0


def _of_kind(found: Mapping[Site, Tensor], kind: Kind) -> list[Tensor]:
    """The tensors of the sites of one kind, in order of execution."""
    return [each for site, each in found.items() if site.kind == kind]


def sites_in_use(backbone: Backbone, guidance: GuidanceSettings) -> tuple[Sequence[Site], Sequence[Site]]:
    """The sites that the guidance loss reads, and the sites that give the shapes; refuses impossible ones."""
    guided, shaping = backbone.default_sites.guidance, backbone.default_sites.shapes
    chosen = []
    for option, default in (("layers", guided), ("shape_layers", shaping)):
        wanted = getattr(guidance, option)
        if wanted is None:
            chosen.append(default)
            continue
        if not wanted:
            raise MifoError(f"guidance.{option} is empty: name at least one layer.")
        if unknown := set(wanted) - {site.index for site in backbone.sites}:
            raise MifoError(
                f"guidance.{option} names layer {min(unknown)}, but the model has 0 to "
                f"{len(backbone.sites) - 1}."
            )
        chosen.append(tuple(site for site in backbone.sites if site.index in wanted))
    guided, shaping = chosen
    if len({site.kind for site in shaping}) < 2 or len({site.size for site in shaping}) > 1:
        raise MifoError("guidance.shape_layers needs a self- and a cross-attention layer of one resolution.")
    return guided, shaping
