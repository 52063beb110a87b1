"""A run that goes on from its folder. A folder may come from a stranger, so that it is read as data.

The run's resolved configuration is typed by the task's schema and becomes Hydra's primary configuration. The
folder decides neither which code runs nor where files are written; what the user types now does.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from mifo.config.compose import as_plain, settings_of
from mifo.config.identity import NOT_IDENTITY
from mifo.config.location import conf_folder
from mifo.config.schema import SCHEMAS
from mifo.errors import MifoError
from mifo.files import COMMAND, CONFIG, read_record, read_yaml

RESUMED = "resumed"  # the name of the primary configuration
# what may differ when a run is continued, since it changes where and how fast, not what
FREE = NOT_IDENTITY - {"task", "sheet"} | {"device", "performance", "trainer"}
_GROUPS = ("trainer", "performance", "logger", "callbacks")  # chosen anew, they replace what is recorded
# values that follow a key in conf/, and follow it again when the key is typed anew
_FOLLOWERS = {"trainer.accelerator": "device", "logger.wandb.group": "group", "logger.wandb.tags": "tags"}
_PLACES = re.compile(r"(^|_)(dir|dirs|dirpath|directory|path|root|folder|file|filename|uri|location)$")


@dataclass(frozen=True)
class Command:
    """What was typed for a run and where, the digest of the user's image and masks, and its signature."""

    overrides: list[str]
    folder: str
    files: str | None = None
    signature: str | None = None


def folder_to_resume(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder of `resume=FOLDER` among a command's arguments, and the other arguments.

    FOLDER is taken as it is, whatever characters it has, or without quotes and backslashes where there is no
    such folder.
    """
    given = [text for text in arguments if re.match(r"\+{0,2}resume=", text)]
    others = [text for text in arguments if text not in given]
    if not given or given[-1].endswith("resume=null"):
        return None, others
    text = given[-1].partition("=")[2]
    bare = re.sub(r"\\(\W)", r"\1", text[1:-1] if re.fullmatch(r"(['\"]).*\1", text, re.DOTALL) else text)
    folders = [Path(each).expanduser().absolute() for each in (text, bare)]
    return next((folder for folder in folders if folder.is_dir()), folders[0]), others


def resume(task: str, folder: Path, overrides: Sequence[str]) -> None:
    """Make the run in `folder` Hydra's primary configuration `RESUMED`, in the working folder of that run.

    Args:
        overrides: what the user types now; keys of `FREE` alone.

    Raises:
        MifoError: no run of `task` lies there, its configuration is damaged or leads out of the folder, or
            `overrides` change what was learned from.
    """
    _check_entries(folder)
    recorded = read_settings(folder, task)
    typed = OverridesParser.create().parse_overrides(list(overrides))
    for group in _GROUPS:
        if any(override.key_or_group == group for override in typed):
            recorded.pop(group, None)
    foreign = dict(_foreign(recorded, folder))
    for override in typed:
        key = override.key_or_group
        is_free = key.split(".")[0] in {*FREE, "hydra"} - {"resume", "paths"} and key != "hydra.run.dir"
        if not is_free and key not in foreign:
            raise MifoError(
                f"{override.input_line} cannot change a run that goes on; leave it out, or start a new run"
            )
    for key, value in foreign.items():
        if not any(_replaces(override, key) for override in typed):
            raise MifoError(
                f"{folder / CONFIG} has {key}={value}, which a folder may not choose: it is code outside "
                f"MIFO or a place outside the folder; if you trust it, add '++{key}={value}' to the command"
            )
    keys = OmegaConf.create(_moved(recorded, recorded["paths"]["output"], str(folder)))
    for follower, key in _FOLLOWERS.items():
        is_typed = any(override.key_or_group == key for override in typed)
        if is_typed and OmegaConf.select(keys, follower) is not None:
            OmegaConf.update(keys, follower, f"${{{key}}}")
    keys.resume = str(folder)
    place = {"hydra": {"run": {"dir": str(folder)}}}
    defaults = [f"schema/{task}", {"hydra": "default"}, "_self_", *({group: None} for group in _GROUPS)]
    ConfigStore.instance().store(
        name=RESUMED, node={"defaults": defaults, **OmegaConf.to_container(keys), **place}
    )
    # relative paths mean what they did
    if Path(where := recorded_command(folder).folder).is_dir():
        os.chdir(where)


def read_settings(folder: Path, task: str) -> dict[str, Any]:
    """The configuration that the run of `task` in `folder` recorded, typed by the schema, in plain types.

    Raises:
        MifoError: there is none, it is damaged, or of another task.
    """
    path = folder / CONFIG
    if not path.is_file():
        kind = "it is a file, not a folder" if folder.is_file() else f"it lacks {CONFIG}"
        raise MifoError(
            f"resume={folder}: no run to go on with ({kind}); name the folder of a run that began, or give "
            "the command of this one again"
        )
    content = read_yaml(path, from_outside=True)
    if not isinstance(content, dict) or content.get("task") not in SCHEMAS:
        raise MifoError(f"{path} is no configuration of a run of MIFO; name the folder of one")
    if content["task"] != task:
        raise MifoError(
            f"{folder} holds a run of mifo {content['task']}; name it there, not with mifo {task}"
        )
    if "${" in str(folder):
        raise MifoError(f"{folder} has ${{…}} in its name, which is not read; give it another name")
    try:
        return as_plain(settings_of(OmegaConf.create(content)))
    except MifoError as error:
        raise MifoError(
            f"{path} is damaged, or of another version of MIFO ({error}); start a new run"
        ) from error


def recorded_command(folder: Path) -> Command:
    """What was typed for the run in `folder`; nothing where that was not recorded.

    Raises:
        MifoError: the record is damaged.
    """
    path = folder / COMMAND
    return read_record(path, Command) if path.is_file() else Command([], str(Path.cwd()))


def trusted_again(folder: Path, task: str) -> list[str]:
    """The overrides that `resume` asks for beside this run's folder, which its user has typed before."""
    return [f"++{key}={value}" for key, value in _foreign(read_settings(folder, task), folder)]


def _replaces(override: Override, key: str) -> bool:
    """Whether a typed override takes the place of a recorded key."""
    own = override.key_or_group
    return own == key or (override.is_delete() and key.startswith(f"{own}."))


def _foreign(recorded: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values that choose code outside MIFO and Lightning's callbacks, or places outside `folder`."""
    before = recorded["paths"]["output"]
    if (cache := recorded.get("learning", {}).get("prior", {}).get("cache")) is not None:  # it is written to
        yield "learning.prior.cache", cache
    for name, term in recorded.get("penalty", {}).get("terms", {}).items():
        if "." in term["loss"] and not term["loss"].startswith("mifo.method.losses."):
            yield f"penalty.terms.{name}.loss", term["loss"]
    made = {name: recorded.get(name, {}) for name in ("trainer", "logger", "callbacks")}
    for stage in ("semantic", "finetuning"):
        for part in ("optimizer", "lr_scheduler"):
            node = recorded.get("learning", {}).get(stage, {}).get(part, {})
            made[f"learning.{stage}.{part}"] = node
    for section, node in made.items():
        for keys, value, mine in _leaves(node, tuple(section.split(".")), False):
            key = ".".join(keys)
            if keys[-1] == "_target_":
                if value not in _targets_of_conf() and value not in _callbacks_of_lightning():
                    yield key, value
            elif "settings" in keys:  # of Weights & Biases: its server, its program
                if not mine:
                    yield key, value
            elif isinstance(value, str) and not mine and _is_place(keys[-1], value):
                place = Path(_moved(value, before, str(folder))).expanduser()
                if not _really(place).is_relative_to(_really(folder)):
                    yield key, value


def _leaves(node: Any, keys: tuple[str, ...], mine: bool) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Keys and value of everything in `node` that is no dict or list, and whether it goes to a part of MIFO.

    MIFO's own parts write in the run's folder alone.
    """
    if isinstance(node, dict):
        mine = str(node["_target_"]).startswith("mifo.") if "_target_" in node else mine
        for key, value in node.items():
            yield from _leaves(value, (*keys, str(key)), mine)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, (*keys, str(number)), mine)
    else:
        yield keys, node, mine


def _is_place(key: str, value: str) -> bool:
    """Whether a text may be a path that is written to, by its key or its look."""
    return bool(_PLACES.search(key)) or value.startswith(("/", "~")) or ".." in Path(value).parts


def _moved(node: Any, before: str, now: str) -> Any:
    """`node` with the paths that lay in the folder `before` in the folder `now`."""
    if isinstance(node, dict):
        return {key: _moved(value, before, now) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, before, now) for value in node]
    inside = isinstance(node, str) and (node == before or node.startswith(f"{before}/"))
    return now + node[len(before) :] if inside else node


@cache
def _targets_of_conf() -> frozenset[str]:
    """What the options in conf/ instantiate."""
    groups = ("callbacks", "logger", "trainer", "optimizer", "lr_scheduler")
    files = [path for group in groups for path in sorted((conf_folder() / group).glob("*.yaml"))]
    options = [read_yaml(path) for path in files]
    return frozenset(value for keys, value, _ in _leaves(options, ("",), False) if keys[-1] == "_target_")


@cache
def _callbacks_of_lightning() -> frozenset[str]:
    from lightning.pytorch import callbacks

    places = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
    return frozenset(f"{place}.{name}" for place in places for name in callbacks.__all__)


def _check_entries(folder: Path) -> None:
    """Refuse links that lead out of the folder, and pipes, which would be written to or waited for."""
    if not folder.is_dir():
        return
    inside = _really(folder)
    for place, folders, files in os.walk(folder):
        if Path(place).parent == folder / "wandb":  # a run of Weights & Biases, to which nobody writes again
            folders.clear()
            continue
        for path in (Path(place, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) and not _really(path).is_relative_to(inside):
                raise MifoError(
                    f"{path} is a link out of the run's folder; put what it leads to in its place"
                )
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise MifoError(f"{path} is neither a file nor a folder; take it out of the run's folder")


def _really(path: Path) -> Path:
    """Where a path leads; `Path.resolve` would raise for a circle of links."""
    return Path(os.path.realpath(path))
