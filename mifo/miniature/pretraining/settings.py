"""Settings of the miniature's pretraining."""

from dataclasses import dataclass, field

PARTS = ("autoencoder", "decoder", "text_encoder", "denoiser", "transformer", "clip", "vit", "segmenter")
"""What is trained, in the order of need."""


@dataclass
class PartSettings:
    """How long and how fast one part learns."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    average_decay: float = 0.999


@dataclass
class PretrainSettings:
    """The scenes and the parts; those in ``parts`` are made in order, each from its checkpoint on.

    ``after`` is the folder of an earlier run whose finished parts are taken over: parts can be made in runs
    of their own, on several GPUs at once. The decoder needs the autoencoder, the denoiser and the transformer
    the text encoder too. ``start`` is a folder ``pipeline/`` of weights, or "embedded": the denoiser goes on
    from it and keeps its autoencoder, the transformer takes its autoencoder and starts from its text encoder.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    scenes: int = 100_000
    seed: int = 0
    after: str | None = None
    start: str | None = None
    words: float = 0.0  # share of things that the denoiser's captions say by a word of their own
    minutes: float | None = None
    compile: bool = True
    autoencoder: PartSettings = field(default_factory=lambda: PartSettings(4000, 96, 6e-4))
    decoder: PartSettings = field(default_factory=lambda: PartSettings(4000, 96, 4e-4))
    text_encoder: PartSettings = field(default_factory=lambda: PartSettings(400, 768, 1.2e-3, 40, 0.99))
    denoiser: PartSettings = field(default_factory=lambda: PartSettings(10_000, 384, 7e-4, 300))
    transformer: PartSettings = field(default_factory=lambda: PartSettings(10_000, 512, 6e-4, 500))
    clip: PartSettings = field(default_factory=lambda: PartSettings(6000, 512, 6e-4))
    vit: PartSettings = field(default_factory=lambda: PartSettings(4000, 512, 6e-4))
    segmenter: PartSettings = field(default_factory=lambda: PartSettings(3000, 128, 2e-3))
