"""A section of the configuration handed to what is instantiated, such as a callback, in its own type."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf


def section(schema: str, given: Mapping[str, Any], **changes: Any) -> Any:
    """`given` as the dataclass named `schema`, with some keys changed."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(get_class(schema)), given, changes))
