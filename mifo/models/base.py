"""What a learned result counts on in its base model: recorded when saved, compared when loaded."""

from collections.abc import Mapping
from pathlib import Path

from mifo.errors import MifoError
from mifo.models.loading import DiffusionModel

NOISE = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
)
SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one")


def base_of(model: DiffusionModel) -> dict[str, str | None]:
    """Where the base model comes from, and what a result that is learned on it counts on."""
    return {
        "name": model.name,
        "source": model.source,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        **_conditions(model),
    }


def sampling_of(model: DiffusionModel) -> str:
    """What changes the pictures of plain sampling, beside weights, prompt, seed and steps."""
    return f"{_conditions(model)} {_scheduler_values(model, SAMPLING)}"


def check_base(folder: Path | str, recorded: Mapping[str, str | None], model: DiffusionModel) -> None:
    """Refuse to load a learned result on another base model than its own.

    Args:
        folder: of the learned result, for the message.
        recorded: what `base_of` gave when it was saved. A result of an earlier version lacks some keys, which
            are not compared.

    Raises:
        MifoError: naming what differs and both values.
    """
    present = base_of(model)
    if recorded["fingerprint"] != present["fingerprint"]:
        raise MifoError(
            f"{folder} was learned on {_told(recorded)}, not on {_told(present)}; load it on that."
        )
    for key, value in _conditions(model).items():
        if recorded.get(key, value) != value:
            raise MifoError(
                f"{folder} was learned on {_told(recorded)} with {key}={recorded[key]}, but "
                f"{present['source']} has {key}={value}; put that back, or learn anew."
            )


def _conditions(model: DiffusionModel) -> dict[str, str]:
    """What weights mean, beside the weights themselves."""
    return {
        "prediction_type": model.prediction_type,
        "noise": _scheduler_values(model, NOISE),
        "vae_scaling_factor": str(model.vae.config.scaling_factor),
        "vocabulary": model.vocabulary,
        "text_rows": str(model.text_encoder.config.vocab_size),
    }


def _scheduler_values(model: DiffusionModel, keys: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {model.noise_scheduler.config[key]}" for key in keys)


def _told(base: Mapping[str, str | None]) -> str:
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['name']} ({base['source']}{revision}, weights {base['fingerprint'][:8]})"
