"""Settings of learning; the defaults are those of MIFO (arXiv 2511.00542) on Stable Diffusion 2.1."""

from dataclasses import dataclass, field


@dataclass
class StageSettings:
    """One stage of learning. `steps: 0` leaves the stage out."""

    steps: int = 600
    batch_size: int = 1  # instance samples a step; with a prior as many class samples come on top
    learn: str = "tokens"  # beside the new token rows: tokens (nothing) | kv | unet | full | lora
    lora_rank: int = 16  # read by `learn: lora` only
    optimizer: str = "adamw"  # adamw | adamw_8bit
    learning_rate: float = 5e-3
    schedule: str = "cosine_with_restarts"  # a schedule name of diffusers.optimization; one cycle
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    eps: float = 1e-8
    gradient_clip: float = 1.0  # largest norm of the gradient; 0 leaves it unclipped
    checkpoint_every: int = 100  # steps between checkpoints for `resume`; 0: none, the stage begins anew


def _finetuning() -> StageSettings:
    return StageSettings(
        steps=400,
        learn="full",
        optimizer="adamw_8bit",
        learning_rate=2e-6,
        schedule="constant",
        warmup_steps=0,
        checkpoint_every=0,  # of Stable Diffusion one takes some 10 GB
    )


@dataclass
class PriorSettings:
    """Prior preservation (DreamBooth, arXiv 2208.12242, eq. 2) of the second stage."""

    weight: float = 1.0  # of the loss on the class pictures; 0 leaves them out
    pictures: int = 100  # in all, shared out among the class prompts
    # {class} becomes "a car", "an apple": the class of each instance in turn
    prompts: list[str] = field(default_factory=lambda: ["a photo of {class}"])
    folder: str | None = None  # pictures of one's own, used instead of pictures made by the base model
    cache: str | None = None  # where made pictures are kept; None: the user's cache folder
    steps: int = 50  # DDIM steps of a made picture
    guidance_scale: float = 7.5
    batch_size: int | None = None  # pictures made at once; None: what suits the device


@dataclass
class LearningSettings:
    """Both stages, what they draw at each step, and how the result is saved."""

    semantic: StageSettings = field(default_factory=StageSettings)
    finetuning: StageSettings = field(default_factory=_finetuning)
    prior: PriorSettings = field(default_factory=PriorSettings)
    template: str = "a photo of {}"  # {} becomes "<asset0> and <asset2>"
    union_sampling: bool = True  # False: all instances in their order at every step
    flip_probability: float = 0.5  # mirror image, left-right; 0 keeps text on objects readable
    save_half: bool = False  # save fine-tuned weights in half precision, half the size and rounded
