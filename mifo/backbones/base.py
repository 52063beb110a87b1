"""A learned result belongs to one base model: what identifies that is recorded, and compared at loading."""

from collections.abc import Mapping
from pathlib import Path

from mifo.backbones.model import ORIGIN, DiffusionModel
from mifo.errors import MifoError


def check_base(folder: Path | str, recorded: Mapping[str, str | None], model: DiffusionModel) -> None:
    """Refuse to load a learned result on another base model than its own.

    Args:
        folder: of the learned result, for the message.
        recorded: `model.identity()` when the result was saved. A result of an earlier version lacks some
            keys, which are not compared.

    Raises:
        MifoError: naming what differs and both values.
    """
    present = model.identity()
    if recorded["fingerprint"] != present["fingerprint"]:
        raise MifoError(
            f"{folder} was learned on {_told(recorded)}, not on {_told(present)}; load it on that."
        )
    for key, value in present.items():
        if key not in ORIGIN and recorded.get(key, value) != value:
            raise MifoError(
                f"{folder} was learned on {_told(recorded)} with {key}={recorded[key]}, but "
                f"{present['source']} has {key}={value}; put that back, or learn anew."
            )


def _told(base: Mapping[str, str | None]) -> str:
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['name']} ({base['source']}{revision}, weights {(base['fingerprint'] or '')[:8]})"
