"""The source and the names of instances, found before any pixel is read. This file imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mifo.data.photo_folder import image_file, mask_sources
from mifo.data.settings import InstancesSettings
from mifo.errors import MifoError, check_known, first_line
from mifo.files import as_record, read_yaml
from mifo.method.prompts.instances import instance_tokens
from mifo.world.drawn import DrawnSettings
from mifo.world.spec import SceneSpec, check_scene

FITS = ("squash", "crop", "pad")


@dataclass(frozen=True)
class InstanceNames:
    """The names of N instances."""

    tokens: tuple[str, ...]  # "<asset0>" …
    class_names: tuple[str, ...] | None  # words such as "car"; None: not known
    initializers: tuple[str | None, ...]  # the word whose embedding the token starts from; None: random


def find_source(settings: InstancesSettings) -> Path | SceneSpec:
    """The folder or the scene of the miniature that holds the instances; exactly one must be given."""
    if settings.folder is None:
        if settings.scene is None:
            raise MifoError("instances has neither a folder nor a scene; set instances.folder=PATH.")
        schema = DrawnSettings if "kind" in settings.scene else SceneSpec
        try:
            spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), settings.scene))
        except OmegaConfBaseException as error:
            raise MifoError(f"instances.scene.{error.full_key}: {first_line(error)}.") from error
        if isinstance(spec, DrawnSettings):
            from mifo.world.drawing import draw_spec  # imported here, since it needs torch

            return draw_spec(spec)
        check_scene(spec)
        return spec
    if settings.scene is not None:
        raise MifoError(
            f"instances {settings.name} has a scene, so it can not have the folder {settings.folder} too; "
            "for a picture of your own take instances=local instances.folder=PATH."
        )
    return Path(settings.folder).expanduser()


def instances_in(recorded: Path, key: str | None = None) -> InstancesSettings:
    """The instances that a YAML file holds, itself or under `key`.

    Raises:
        MifoError: the file is missing or damaged.
    """
    content = read_yaml(recorded, from_outside=True)
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    return as_record(content, InstancesSettings, recorded)


def name_instances(settings: InstancesSettings) -> InstanceNames:
    """Count the instances that `settings` name, by their masks or as things of the scene, and name them.

    Raises:
        MifoError: as `find_source`, `image_file` and `mask_sources`; an unknown `fit`; names that do not
            match the number of instances, or an empty initializer.
    """
    source = find_source(settings)
    check_known("instances.fit", settings.fit, FITS)
    if any(word is not None and not word.strip() for word in settings.initializers or ()):
        raise MifoError("instances.initializers holds an empty word; name a word such as 'car', or null.")
    if isinstance(source, Path):
        image_file(source)
        told = [each.name for each in mask_sources(source)]
    else:
        told = [thing.thing for thing in source.things]
    count = len(told)
    known = [name for name in told if name] if all(told) else []
    # words of drawn scenes start at their classes, since nobody wrote initializers
    starts = told if settings.scene and "kind" in settings.scene else [None] * count
    for key in ("class_names", "initializers"):
        _check_number(key, getattr(settings, key), count)
    return InstanceNames(
        tokens=tuple(instance_tokens(count)),
        class_names=tuple(settings.class_names or known) or None,
        initializers=tuple(settings.initializers or starts),
    )


def _check_number(key: str, names: Sequence[str | None] | None, count: int) -> None:
    """Refuse names of more or fewer instances than there are; no names are as good as None."""
    if names and len(names) != count:
        raise MifoError(
            f"instances.{key} names {len(names)} instances, but there are {count}; name one each."
        )
