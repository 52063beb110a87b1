"""Keys of earlier versions, so that a refusal can name the key of today."""

RENAMED = {
    "schedule": "recipe",
    "penalty.warmup.term": "penalty.terms.NAME.loss",
    "penalty.warmup.weight": "penalty.reward_weight",
    "penalty.warmup_steps": "penalty.reward_steps",
    "penalty.semantic.term": "penalty.terms.NAME.loss",
    "penalty.semantic.weight": "penalty.terms.penalty.weight",
    "penalty.finetuning.term": "penalty.terms.NAME.loss",
    "penalty.finetuning.weight": "penalty.terms.finetuning.weight",
    "penalty.timestep_limit": "penalty.time_below, a share of all timesteps, 0.5 for 500 of 1000",
    **{
        f"learning.{stage}.{old}": new.format(stage=stage)
        for stage in ("semantic", "finetuning")
        for old, new in {
            "learn": "learning.{stage}.trainable, with cross_attention_kv for kv and denoiser for unet",
            "schedule": "lr_scheduler@learning.{stage}.lr_scheduler",
            "warmup_steps": "learning.{stage}.lr_warmup_steps",
        }.items()
    },
}


def renamed(key: str) -> str:
    """A sentence that names what `key`, or the keys below it, are called now; empty for other keys."""
    new = [now for old, now in RENAMED.items() if f"{old}.".startswith(f"{key}.")]
    return f"{key} has another name in this version: {' and '.join(dict.fromkeys(new))}" if new else ""
