"""Settings of learning; the defaults are those of MIFO (arXiv 2511.00542) on Stable Diffusion 2.1."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mifo.data.settings import DrawSettings

if TYPE_CHECKING:  # help and composition import no torch
    from mifo.method.backbone import Stage


def adamw() -> dict[str, Any]:
    """AdamW of torch, as `conf/optimizer/adamw.yaml` has it."""
    return {"_target_": "torch.optim.AdamW"}


def adamw_8bit() -> dict[str, Any]:
    """MIFO's AdamW with moments of 8 bits."""
    return {"_target_": "mifo.acceleration.adamw_8bit.AdamW8bit"}


def constant() -> dict[str, Any]:
    """A rate that stays, as `conf/lr_scheduler/constant.yaml` has it."""
    return {"_target_": "diffusers.optimization.get_constant_schedule"}


def cosine_with_restarts() -> dict[str, Any]:
    """One cycle of half a cosine after a warm-up."""
    return {"_target_": "diffusers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup"}


@dataclass
class StageSettings:
    """One stage of learning. `steps: 0` leaves the stage out."""

    steps: int = 600
    batch_size: int = 1  # instance samples a step; with a prior as many class samples come on top
    # parameters that learn, together with the new token rows:
    # tokens (no others) | cross_attention_kv | denoiser | full | lora
    trainable: str = "tokens"
    lora_rank: int = 16  # read by `trainable: lora` only
    optimizer: dict[str, Any] = field(default_factory=adamw)  # `_target_` and arguments; see conf/optimizer
    learning_rate: float = 5e-3
    lr_scheduler: dict[str, Any] = field(default_factory=cosine_with_restarts)  # see conf/lr_scheduler
    lr_warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-2
    eps: float = 1e-8
    gradient_clip: float = 1.0  # largest norm of the gradient; 0 leaves it unclipped
    checkpoint_every: int = 100  # steps between checkpoints for `resume`; 0: none, the stage begins anew

    @property
    def state_bytes(self) -> float:
        """Bytes of the optimiser's two states of a weight: 8 bits each with a scale for 256, or float32."""
        return 2 + 8 / 256 if "8bit" in self.optimizer["_target_"] else 8


def _finetuning() -> StageSettings:
    return StageSettings(
        steps=400,
        trainable="full",
        optimizer=adamw_8bit(),
        learning_rate=2e-6,
        lr_scheduler=constant(),
        lr_warmup_steps=0,
        checkpoint_every=0,  # of Stable Diffusion one takes some 10 GB
    )


@dataclass
class LearningSettings(DrawSettings):
    """Both stages, what they draw at each step, and how the result is saved."""

    semantic: StageSettings = field(default_factory=StageSettings)
    finetuning: StageSettings = field(default_factory=_finetuning)
    save_half: bool = False  # save fine-tuned weights in half precision, half the size and rounded

    @property
    def has_prior(self) -> bool:
        """Whether class pictures are learned too."""
        return self.finetuning.steps > 0 and self.prior.weight > 0

    @property
    def last_step(self) -> int:
        """How many steps the last stage has."""
        return self.finetuning.steps or self.semantic.steps

    @property
    def stages(self) -> list[tuple["Stage", StageSettings, float]]:
        """Name, settings and weight of the prior of each stage, in their order; some may have no steps."""
        return [("semantic", self.semantic, 0.0), ("finetuning", self.finetuning, self.prior.weight)]
