"""What box control does and how strongly: masked attention, latent guidance, renewed shapes."""

from dataclasses import dataclass

from mifo.errors import MifoError, check_least


@dataclass
class GuidanceSettings:
    """Box control of synthesis. The defaults are those of MIFO (arXiv 2511.00542).

    Ablations: `penalty_scale=0` is Bounded Attention (arXiv 2403.16990), `guided_steps=0` leaves masked
    attention alone, and `masked=False` with `guided_steps=0` is plain sampling.
    """

    masked: bool = True  # mask attention by boxes, later by shapes, in guidance and denoising passes
    guided_steps: int = 15  # so many first denoising steps are each preceded by latent guidance
    iterations: int = 5  # gradient steps on the latents before one guided step, at most
    threshold: float = 0.2  # a step's iterations end when the loss per sample and subject is below this
    step_size_start: float = 8.0  # step size η, which falls linearly over the guided steps
    step_size_end: float = 2.0
    cross_weight: float = 1.5  # of the cross-attention terms of the loss
    self_weight: float = 0.5  # of its self-attention terms
    penalty_scale: float = 1.0  # factor on the scheduled weight α of MIFO's penalty on the background
    margin: float = 0.0  # share of the picture by which each box's sides move in before attention is bounded
    layers: list[int] | None = None  # `Site.index` of the sites that the loss reads; None: the model's own
    shapes_from: int = 15  # the step before which boxes first give way to the shapes formed inside them
    shapes_every: int = 5  # steps between renewals of the shapes; 0 keeps the boxes
    shape_layers: list[int] | None = None  # of the sites, of one size, that give the shapes; None: as above
    clusters_per_subject: int = 3  # clusters of the self-attention map
    shape_threshold: float = 0.2  # least score in [0, 1] with which a cluster goes to a subject
    restarts: int = 100  # starts of the first k-means


def check_guidance(settings: GuidanceSettings) -> None:
    """Refuse impossible settings before any model is loaded; layers are checked with the model."""
    check_least("guidance", settings, guided_steps=0, iterations=0, shapes_every=0, margin=0)
    check_least("guidance", settings, clusters_per_subject=1, restarts=1)
    if settings.shapes_every and settings.shapes_from < 1:
        raise MifoError(
            f"guidance.shapes_from={settings.shapes_from} is too early, since shapes form in earlier steps; "
            "take at least 1, or guidance.shapes_every=0 to keep the boxes."
        )
