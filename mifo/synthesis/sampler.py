"""The whole synthesis loop: DDIM with masked attention, latent guidance by boxes, and renewed shapes.

MIFO (arXiv 2511.00542), which builds on Bounded Attention (arXiv 2403.16990).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from mifo.attention.layers import attention_layers, choose_layers
from mifo.attention.masking import MOST_SUBJECTS, MaskedAttention
from mifo.diffusion.classifier_free_guidance import classifier_free_guidance
from mifo.diffusion.ddim import ddim_step, ddim_timesteps
from mifo.diffusion.noise_schedule import NoiseSchedule
from mifo.errors import MifoError
from mifo.guidance.descent import descend
from mifo.guidance.settings import GuidanceSettings
from mifo.performance.graphs import GraphedFunction
from mifo.shapes.boxes import check_boxes, rasterise_boxes, resize_shapes
from mifo.shapes.renewal import renew_shapes
from mifo.synthesis.settings import SynthesisSettings


@dataclass(frozen=True)
class Subject:
    """An instance, or any thing the prompt names, that has a box.

    Attributes:
        name: as the user wrote it, such as "<asset0>" or "red car".
        token_indices: positions of its tokens in the prompt; the last is the leading one.
        box: [x0, y0, x1, y1] in [0, 1].
    """

    name: str
    token_indices: tuple[int, ...]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class StepReport:
    """Where a synthesis stands after a denoising step.

    Attributes:
        step: the step just done, from 0. steps: how many there are. timestep: of 1000.
        latents: (B, 4, H, W) after the step.
        shapes: bool (B, S, R, R) in force during the step, None without boxes.
        losses: guidance loss per sample and subject of each iteration of this step, on the latents' device.
    """

    step: int
    steps: int
    timestep: int
    latents: Tensor
    shapes: Tensor | None
    losses: Tensor


class BoxSampler:
    """One synthesis with boxes, step by step; `synthesize` is the loop. Use it in a `with` block.

    Of each step, call `guide`, `renew` and `denoise`, in this order.

    Attributes:
        counter: readings of the penalty's weight α so far; set it to go on in the middle of a run.
        shapes: bool (B or 1, S, R, R) in force.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        encoder_hidden_states: Tensor,
        latent_size: int,
        subjects: Sequence[Subject],
        filter_indices: Sequence[int],
        eos_index: int,
        settings: SynthesisSettings,
        guidance: GuidanceSettings,
        seed: int = 0,
        graphs: bool = False,
        kept: "KeptPasses | None" = None,
    ) -> None:
        """Arguments as for `synthesize`; `latent_size` is the side of the latents."""
        guidance_layers, shape_layers, divisor = layers_in_use(unet, guidance)
        side = latent_size // divisor
        check_boxes({subject.name: subject.box for subject in subjects}, side)

        self.schedule = schedule
        self.settings = settings
        self.guidance = guidance
        self.seed = seed
        self.timesteps = ddim_timesteps(settings.steps, schedule)
        self.counter = 0
        self._records = any(self._renews_at(step) for step in range(1, len(self.timesteps)))
        device = encoder_hidden_states.device
        boxes = [subject.box for subject in subjects]
        self.boxes = rasterise_boxes(boxes, side, device)
        self.shapes = self.boxes[None]
        self._centres: Tensor | None = None
        prompt = (
            encoder_hidden_states,
            [subject.token_indices for subject in subjects],
            filter_indices,
            eos_index,
        )
        form = (encoder_hidden_states.shape, latent_size, len(subjects), guidance_layers, shape_layers)
        self._attention = (kept or KeptPasses()).of_form(
            (*form, guidance.masked, guidance.cross_weight, guidance.self_weight),
            lambda: MaskedAttention(
                unet, *prompt, guidance_layers, shape_layers, guidance.masked, graphs, guidance
            ),
        )
        self._attention.turn_to(*prompt)
        # masks of a captured pass keep their form when each sample gets shapes of its own
        samples = len(encoder_hidden_states) // 2 if graphs and self._records else 1
        self._attention.bound(lambda side: rasterise_boxes(boxes, side, device).repeat(samples, 1, 1, 1))
        self._times = torch.tensor(self.timesteps, device=device)

    def guide(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Descend on the guidance loss, if the step is guided: latents (B, 4, H, W), losses (iterations,)."""
        if step >= self.guidance.guided_steps:
            return latents, latents.new_zeros(0)
        latents, losses, self.counter = descend(
            latents,
            lambda z, alphas: self._attention.guidance_gradient(z, self._times[step], alphas),
            step,
            self.counter,
            self.guidance,
        )
        return latents, losses

    def renew(self, step: int) -> None:
        """Let the shapes that have formed replace the boxes or the last shapes, if it is time."""
        if not self._renews_at(step):
            return
        self.shapes, self._centres = renew_shapes(
            self._attention.self_map,
            self._attention.cross_map,
            self.shapes,
            self.boxes,
            self.guidance.clusters_per_subject,
            self.guidance.shape_threshold,
            self.guidance.restarts,
            self.seed,
            self._centres,
        )
        self._attention.bound(lambda side: resize_shapes(self.shapes, side))

    def denoise(self, latents: Tensor, step: int) -> Tensor:
        """One DDIM step of latents (B, 4, H, W)."""
        prediction = self._attention.denoising_pass(latents, self._times[step], self._records)
        return _ddim(self.schedule, self.settings, latents, prediction, self.timesteps[step])

    def _renews_at(self, step: int) -> bool:
        since = step - self.guidance.shapes_from
        every = self.guidance.shapes_every
        return self.guidance.masked and every > 0 and since >= 0 and since % every == 0

    def __enter__(self) -> Self:
        self._attention.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attention.__exit__(kind, error, trace)


class KeptPasses:
    """The U-Net's passes of the last synthesis, so that one of the same form goes on with their CUDA graphs.

    It serves one U-Net, with or without graphs throughout.
    """

    def __init__(self) -> None:
        self._form: tuple[Any, ...] | None = None
        self._passes: Any = None

    def of_form(self, form: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What was kept of this form, else what `make` makes."""
        if form != self._form:
            self._passes = None  # the memory of old graphs goes before new ones are captured
            self._form, self._passes = form, make()
        return self._passes


def layers_in_use(unet: nn.Module, guidance: GuidanceSettings) -> tuple[Sequence[int], Sequence[int], int]:
    """The layers that the loss reads, those that give the shapes, and the divisor of the latter.

    Raises:
        MifoError: a choice of layers that cannot be read.
    """
    layers, by_place = attention_layers(unet), choose_layers(unet)
    guidance_layers = by_place.guidance if guidance.layers is None else guidance.layers
    shape_layers = by_place.shapes if guidance.shape_layers is None else guidance.shape_layers
    for option, chosen in (("layers", guidance_layers), ("shape_layers", shape_layers)):
        if not chosen:
            raise MifoError(f"guidance.{option} is empty: name at least one layer.")
        if unknown := set(chosen) - {layer.index for layer in layers}:
            raise MifoError(
                f"guidance.{option} names layer {min(unknown)}, but the U-Net has 0 to {len(layers) - 1}."
            )
    shaping = [layer for layer in layers if layer.index in shape_layers]
    kinds, divisors = {layer.kind for layer in shaping}, {layer.divisor for layer in shaping}
    if len(kinds) < 2 or len(divisors) > 1:
        raise MifoError(
            "guidance.shape_layers must name a self- and a cross-attention layer at least, of one resolution."
        )
    return guidance_layers, shape_layers, shaping[0].divisor


@torch.no_grad()
def synthesize(
    unet: nn.Module,
    schedule: NoiseSchedule,
    encoder_hidden_states: Tensor,
    latents: Tensor,
    subjects: Sequence[Subject],
    filter_indices: Sequence[int],
    eos_index: int,
    settings: SynthesisSettings,
    guidance: GuidanceSettings,
    seed: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
    graphs: bool = False,
    kept: KeptPasses | None = None,
) -> Tensor:
    """Sample latents in which each subject stands in its box; without subjects this is plain DDIM sampling.

    Args:
        unet: a diffusers `UNet2DConditionModel`, whose parameters need no gradients. Its attention processors
            are as before on return, also after an exception.
        encoder_hidden_states: (2B, L, width), unconditional rows first, in the U-Net's precision.
        latents: (B, 4, H, W) standard normal; H = W if there are subjects. Sampling keeps their precision.
        filter_indices: positions of the prompt's function words, see `mifo.prompts`.
        eos_index: position of the first end-of-text token.
        seed: seeds k-means.
        on_step: called after every step, for progress bars and pictures.
        graphs: replay the U-Net's passes as CUDA graphs; that needs a GPU of NVIDIA.
        kept: given to one synthesis after the other, it saves those of the same form the capture.

    Returns:
        (B, 4, H, W) clean latents.

    Raises:
        MifoError: an impossible box, layers that do not fit, latents that are not square, shapes that
            disagree, or latents that are not finite after a step.
    """
    watch = _FiniteLatents(on_step)
    if len(encoder_hidden_states) != 2 * len(latents):
        raise MifoError(
            f"{len(latents)} samples need {2 * len(latents)} rows of text states, unconditional first, "
            f"but there are {len(encoder_hidden_states)}."
        )
    if not subjects:
        predict = (kept or KeptPasses()).of_form(
            (latents.shape, encoder_hidden_states.shape),
            lambda: GraphedFunction(partial(_prediction, unet), graphs),
        )
        latents = _sample_plainly(predict, schedule, encoder_hidden_states, latents, settings, watch)
        watch.check()
        return latents
    if latents.shape[-1] != latents.shape[-2]:
        raise MifoError("Box control needs square pictures: give latents of equal height and width.")
    if len(subjects) > MOST_SUBJECTS:
        raise MifoError(f"{len(subjects)} boxes are too many: a prompt can have {MOST_SUBJECTS}.")
    sampler = BoxSampler(
        unet,
        schedule,
        encoder_hidden_states,
        latents.shape[-1],
        subjects,
        filter_indices,
        eos_index,
        settings,
        guidance,
        seed,
        graphs,
        kept,
    )
    with sampler:
        for step, timestep in enumerate(sampler.timesteps):
            latents, losses = sampler.guide(latents, step)
            sampler.renew(step)
            latents = sampler.denoise(latents, step)
            shapes = sampler.shapes.expand(len(latents), -1, -1, -1)
            watch(StepReport(step, settings.steps, timestep, latents, shapes, losses))
    watch.check()
    return latents


class _FiniteLatents:
    """Passes on what each step reports; tells at the end from which step on latents were not finite."""

    def __init__(self, on_step: Callable[[StepReport], None] | None) -> None:
        self._on_step = on_step
        self._sums: list[Tensor] = []  # of all latents, which are NaN or infinite where one number is

    def __call__(self, report: StepReport) -> None:
        self._sums.append(report.latents.sum(dtype=torch.float32))
        if self._on_step:
            self._on_step(report)

    def check(self) -> None:
        """Wait for the device once.

        Raises:
            MifoError: naming the first step whose latents are not finite.
        """
        finite = torch.stack(self._sums).isfinite().tolist()
        if not all(finite):
            raise MifoError(
                f"latents are not finite after step {finite.index(False) + 1} of {len(finite)} of synthesis; "
                "take performance.synthesis_precision=float32, or less guidance"
            )


def _prediction(unet: nn.Module, latents: Tensor, time: Tensor, text_states: Tensor) -> Tensor:
    """Both halves (2B, 4, H, W) in the latents' precision."""
    both = torch.cat([latents, latents]).to(text_states.dtype)
    return unet(both, time, encoder_hidden_states=text_states).sample.to(latents.dtype)


def _sample_plainly(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    encoder_hidden_states: Tensor,
    latents: Tensor,
    settings: SynthesisSettings,
    on_step: Callable[[StepReport], None],
) -> Tensor:
    """DDIM with the U-Net's own attention."""
    timesteps = ddim_timesteps(settings.steps, schedule)
    times = torch.tensor(timesteps, device=latents.device)
    for step, timestep in enumerate(timesteps):
        prediction = predict(latents, times[step], encoder_hidden_states)
        latents = _ddim(schedule, settings, latents, prediction, timestep)
        on_step(StepReport(step, settings.steps, timestep, latents, None, latents.new_zeros(0)))
    return latents


def _ddim(
    schedule: NoiseSchedule, settings: SynthesisSettings, latents: Tensor, prediction: Tensor, timestep: int
) -> Tensor:
    """Combine both halves of a prediction (2B, 4, H, W) and take the DDIM step."""
    guided = classifier_free_guidance(*prediction.chunk(2), settings.guidance_scale)
    stride = len(schedule.alphas_cumprod) // settings.steps
    return ddim_step(schedule, latents, guided, timestep, timestep - stride)
