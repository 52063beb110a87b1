"""Settings of learning; the defaults are those of MIFO (arXiv 2511.00542) on Stable Diffusion 2.1."""

from dataclasses import dataclass, field

from mifo.data.settings import DrawSettings


@dataclass
class StageSettings:
    """One stage of learning. `steps: 0` leaves the stage out."""

    steps: int = 600
    batch_size: int = 1  # instance samples a step; with a prior as many class samples come on top
    # beside the new token rows: tokens (nothing) | cross_attention_kv | denoiser | full | lora
    trainable: str = "tokens"
    lora_rank: int = 16  # read by `trainable: lora` only
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
        trainable="full",
        optimizer="adamw_8bit",
        learning_rate=2e-6,
        schedule="constant",
        warmup_steps=0,
        checkpoint_every=0,  # of Stable Diffusion one takes some 10 GB
    )


@dataclass
class LearningSettings(DrawSettings):
    """Both stages, what they draw at each step, and how the result is saved."""

    semantic: StageSettings = field(default_factory=StageSettings)
    finetuning: StageSettings = field(default_factory=_finetuning)
    save_half: bool = False  # save fine-tuned weights in half precision, half the size and rounded
