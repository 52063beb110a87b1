"""The typed configuration: where it lies, what it may hold, and refusals in one sentence."""

from mifo.config.compose import compose, register_schemas, settings_of
from mifo.config.location import conf_folder

__all__ = ["compose", "conf_folder", "register_schemas", "settings_of"]
