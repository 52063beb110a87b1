"""What box control does and how strongly: masked attention, latent guidance, renewed shapes."""

from dataclasses import dataclass

from mifo.errors import MifoError, check_least


@dataclass
class GuidanceSettings:
    """Box control of synthesis. The defaults are those of MIFO (arXiv 2511.00542).

    Ablations: `penalty_scale=0` is Bounded Attention (arXiv 2403.16990), `guided_steps=0` leaves masked
    attention alone, and `masked=False` with `guided_steps=0` is plain sampling.

    Attributes:
        masked: mask attention by boxes, later by shapes, in guidance and denoising passes.
        guided_steps: how many of the first denoising steps are preceded by latent guidance.
        iterations: gradient steps on the latents before one guided step, at most.
        threshold: no further iteration in a step once the loss per sample and subject is below this.
        step_size_start, step_size_end: step size η falls linearly from the first to the second over
            `guided_steps`.
        cross_weight, self_weight: weights of the cross- and self-attention terms of the loss.
        penalty_scale: factor on the scheduled weight α of MIFO's penalty on the background.
        layers: `Site.index` of the sites that the loss reads; None: the model's default sites.
        shapes_from: the step before which boxes first give way to the shapes formed inside them.
        shapes_every: steps between renewals of the shapes; 0 keeps the boxes.
        shape_layers: the sites whose maps give the shapes, all of one size; None: the model's default sites.
        clusters_per_subject: clusters of the self-attention map, per subject.
        shape_threshold: least score in [0, 1] with which a cluster goes to a subject.
        restarts: starts of the first k-means.
    """

    masked: bool = True
    guided_steps: int = 15
    iterations: int = 5
    threshold: float = 0.2
    step_size_start: float = 8.0
    step_size_end: float = 2.0
    cross_weight: float = 1.5
    self_weight: float = 0.5
    penalty_scale: float = 1.0
    layers: list[int] | None = None
    shapes_from: int = 15
    shapes_every: int = 5
    shape_layers: list[int] | None = None
    clusters_per_subject: int = 3
    shape_threshold: float = 0.2
    restarts: int = 100


def check_guidance(settings: GuidanceSettings) -> None:
    """Refuse impossible settings before any model is loaded; layers are checked with the model."""
    check_least("guidance", settings, guided_steps=0, iterations=0, shapes_every=0)
    check_least("guidance", settings, clusters_per_subject=1, restarts=1)
    if settings.shapes_every and settings.shapes_from < 1:
        raise MifoError(
            f"guidance.shapes_from={settings.shapes_from} is too early, since shapes form in earlier steps; "
            "take at least 1, or guidance.shapes_every=0 to keep the boxes."
        )
