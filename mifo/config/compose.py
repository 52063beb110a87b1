"""From Hydra's untyped composition to typed, checked settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.sweeper import Sweeper
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from mifo.config.identity import listed_defaults, register_resolvers
from mifo.config.location import conf_folder
from mifo.config.renamed import renamed
from mifo.config.schema import SCHEMAS
from mifo.errors import MifoError, nearest
from mifo.files import read_text, refuse_aliases
from mifo.world.drawn import drawn_option

register_resolvers()


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of files, which names the file and the line of what cannot be read.

    An option of `instances` without a file may be the name of a drawn scene (`mifo.world.drawn`). An option
    that changes several sections serves every task: what it sets or chooses for those that `task` does not
    have is dropped. This reader takes the place of Hydra's own by bearing the same name.
    """

    task = "run"  # what is composed; a launcher's process gets it with the reader

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.task = FileConfigSource.task

    def is_config(self, config_path: str) -> bool:
        return super().is_config(config_path) or self._drawn(config_path) is not None

    def _drawn(self, config_path: str) -> DictConfig | None:
        group, _, name = config_path.rpartition("/")
        option = drawn_option(name) if group == "instances" else None
        return option and OmegaConf.create(option)

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not path.is_file():
            if drawn := self._drawn(config_path):
                return ConfigResult(self.provider, self.full_path(), drawn, self._get_header_dict(""))
            return super().load_config(config_path)
        stream = StringIO(read_text(path))
        stream.name = str(path)
        try:
            refuse_aliases(stream.getvalue(), path)
            config = OmegaConf.load(stream)
        except (YAMLError, OSError, RecursionError) as error:
            mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
            place = f"{path}, line {mark.line + 1}" if mark else str(path)
            told = error.problem if isinstance(error, MarkedYAMLError) else str(error)
            raise MifoError(
                f"{place}: this is not YAML that MIFO reads ({' '.join(str(told).split())})"
            ) from error
        header = self._get_header_dict(stream.getvalue())
        if isinstance(config, DictConfig):
            defaults = config.get("defaults", [])
            if not isinstance(defaults, list | ListConfig) or not all(map(_is_default, defaults)):
                raise MifoError(f"{path}: defaults must be a list of NAME and of GROUP: NAME")
            if header["package"] == "_global_" and config and not _keep_own(config, self.task):
                raise MifoError(f"{path} sets nothing that mifo {self.task} reads; leave it out")
        return ConfigResult(self.provider, self.full_path(), config, header)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a launcher's process, where Hydra makes more readers for `hydra.searchpath`."""
        self.__dict__ |= state
        FileConfigSource.task = self.task


def _is_default(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, DictConfig) and len(given) == 1)


def _keep_own(option: DictConfig, task: str) -> bool:
    """Drop what an option sets and chooses for sections that other tasks alone have; whether some is left."""
    for key in _elsewhere(task) & option.keys():
        del option[key]
    if "defaults" in option:
        groups = {path.name for path in conf_folder().iterdir() if path.is_dir()} - _groups(task)
        option.defaults = [each for each in option.defaults if _group(each) not in groups]
    return bool(option.keys() - {"defaults"} or option.get("defaults"))


def _elsewhere(task: str) -> set[str]:
    """Keys and sections that other tasks alone have."""
    every = {field.name for schema in SCHEMAS.values() for field in fields(schema)}
    return every - {field.name for field in fields(SCHEMAS[task])}


@cache
def _groups(task: str) -> set[str]:
    """The groups that a task's file lists, or that of the task on which it builds."""
    listed = listed_defaults(task)
    inner = [_groups(each) for each in listed if isinstance(each, str) and each in SCHEMAS]
    return {_group(each) for each in listed}.union(*inner)


def _group(default: Any) -> str:
    """`penalty` of `penalty: mifo` and `override /penalty: mifo`; nothing of `_self_`."""
    (key,) = default if isinstance(default, Mapping) else ("",)
    return re.split("[/@]", str(key).split()[-1].lstrip("/"))[0] if key else ""


SourcesRegistry.instance().types["file"] = FileConfigSource
_check_batch = Sweeper.validate_batch_is_legal


def _check_first_of_each_kind(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    """Compose one job of each combination of options before the first job begins.

    Hydra composes all of them, each for 0.2 s, and later once more. Jobs that differ in values of keys alone
    can all be composed if one can; what a value may be is said in its own job.
    """

    def kind(override: str) -> str:
        key = override.partition("=")[0]
        return override if "/" in key or _is_group(key) else key

    firsts: dict[tuple[str, ...], Sequence[str]] = {}
    for job in batch:
        firsts.setdefault(tuple(map(kind, job)), job)
    _check_batch(sweeper, [*firsts.values()])


Sweeper.validate_batch_is_legal = _check_first_of_each_kind


def key_of(override: str) -> str:
    """The key of an override of Hydra, which may add or delete it or name a package."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _is_group(override: str) -> bool:
    return (conf_folder() / key_of(override)).is_dir()


def register_schemas(task: str) -> None:
    """Have `task` composed: its files begin with its schema, and options are read for it."""
    FileConfigSource.task = task
    _store_schemas()


@cache
def _store_schemas() -> None:
    """Let each task's primary config begin with every key of its schema and that key's default.

    They are stored untyped: a bad value then fails in its own job when `settings_of` types it, whereas Hydra
    would refuse a whole sweep for it.
    """
    store = ConfigStore.instance()
    for task, schema in SCHEMAS.items():
        defaults = schema(task=task)
        plain = OmegaConf.to_container(OmegaConf.structured(defaults), enum_to_str=True)
        keys = OmegaConf.create({key: value for key, value in plain.items() if key != "origin"})
        for name, value in _walk(defaults):
            node = OmegaConf.select(keys, name)
            if isinstance(value, dict) and node is not None:  # a user fills it, as layout.boxes
                OmegaConf.set_struct(node, False)
        store.store(group="schema", name=task, node=keys, package="_global_")


def check_options(overrides: Sequence[str]) -> None:
    """Refuse a group that is given no option, for which Hydra raises errors of Python without the key."""
    for given in OverridesParser.create().parse_overrides([*overrides]):
        if not _is_group(given.key_or_group):
            continue
        value = given.value()
        if isinstance(value, Glob):
            continue
        for each in value.list if isinstance(value, ChoiceSweep) else [value]:
            option = each.text if isinstance(each, QuotedString) else each
            names = option if isinstance(option, list) and not given.is_delete() else [option]
            is_section = option is None if given.is_delete() else isinstance(option, dict)
            if not is_section and not all(isinstance(name, str) for name in names):
                raise MifoError(
                    f"{given.input_line} is no option of conf/{given.key_or_group}; name one, or leave it out"
                )


def compose(task: str, overrides: list[str], **place: str | None) -> DictConfig:
    """The configuration of `task` outside a Hydra application, for notebooks, tables and tests.

    Args:
        place: fields of `Origin` that the overrides do not tell.
    """
    register_schemas(task)
    check_options(overrides)
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = hydra.compose(task, overrides, return_hydra_config=True)
    with open_dict(config):
        add_origin(config, config.pop("hydra"), **place)
    return config


def add_origin(config: DictConfig, chosen: DictConfig, **place: Any) -> None:
    """Tell `config` of a new run where it comes from, which Hydra's own node `chosen` knows."""
    if "origin" in config:  # recorded when the run began
        return
    choices = {
        group: option
        for group, option in chosen.runtime.choices.items()
        if isinstance(option, str) and not group.startswith(("hydra", "paths"))
    }
    # what the override of a key reads relative to it, nobody else can
    typed = [text.replace("${.", "$(.") for text in chosen.overrides.task]
    with open_dict(config):
        config.origin = {"choices": choices, "overrides": typed, **place}


def settings_of(config: DictConfig) -> Any:
    """Type the composed `config` of a task by its schema.

    Returns:
        The task's settings, a tree of dataclasses.

    Raises:
        MifoError: an unknown key, a value of the wrong type, a mandatory value that nobody gave.
    """
    try:
        # Hydra closes its composition against new keys; what is open is the schema's to say
        given = OmegaConf.create(OmegaConf.to_container(config))
        typed = OmegaConf.structured(SCHEMAS[config.task])
        merged = OmegaConf.merge(typed, given)
        OmegaConf.resolve(merged)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise MifoError(f"{', '.join(sorted(missing))} must be given, for example {min(missing)}=…")
        _check_elements(merged)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise MifoError(explain(error, config.task)) from error


def _check_elements(node: Container) -> None:
    """Refuse lists and mappings in place of the words and numbers of a typed list or mapping.

    OmegaConf checks the type of plain elements alone.
    """
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        value = node._get_node(key)
        if not isinstance(value, Container):
            continue
        wanted = node._metadata.element_type
        if wanted in (str, int, float, bool) and not value._is_none():
            raise MifoError(f"{node._get_full_key(key)}={value} is no {wanted.__name__}; take one value")
        if not value._is_none():
            _check_elements(value)


def written(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):  # names are those of words; asset0 stands for <asset0>
        for name in value:
            if not re.fullmatch(r"[\w<>./@%+ -]+", str(name)):
                raise MifoError(
                    f"the name '{name}' has a sign that Hydra does not read in names; take letters, digits, "
                    "spaces, -, _, . and /"
                )
        pairs = [f"{str(name).strip('<>')}: {written(each)}" for name, each in value.items()]
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return _between(str(value), "'")


def quoted(value: Any) -> str:
    """A value as one types it for Hydra: in quotes where it would not be read as it is."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./:-]+", text):
        return text
    return _between(text, '"')


def _between(text: str, mark: str) -> str:
    """A text in quotation marks. Hydra reads backslashes before a mark in pairs, others as they are."""
    escaped = re.sub(rf"(\\*){mark}", lambda found: f"{2 * found[1]}\\{mark}", text)
    ending = escaped[len(escaped.rstrip("\\")) :]
    return f"{mark}{escaped}{ending}{mark}"


def as_plain(settings: Any) -> dict[str, Any]:
    """Typed settings in the plain types of YAML, as a run's folder records them."""
    return OmegaConf.to_container(OmegaConf.create(asdict(settings)), enum_to_str=True)


def explain(error: Exception, task: str) -> str:
    """One sentence for what Hydra or OmegaConf refused, with the nearest existing name where one is near."""
    if isinstance(error, MifoError):  # a sentence already, perhaps of a file that no task's schema describes
        return str(error)
    useless = f"mifo {task} has no use for {{}}; leave it out, or see mifo {task} --help"
    if overridden := re.search(r"Could not override '([^']+)'(\. No match)?", str(error)):
        key, unmatched = overridden.groups()
        if unmatched and _is_group(key):
            return useless.format(key)
        if told := renamed(key):
            return told
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if not group.startswith("hydra/") and "/" in group:  # a path was typed
            group, _, option = error.missing_cfg_file.partition("/")
        if group == "instances" and "/" in option:
            return f"{group}={option} is no option; for a folder take {group}=local {group}.folder={option}"
        options = error.options or sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        extra = option.partition("_")[0]
        if group == "hydra/launcher" and extra in ("joblib", "ray", "submitit"):
            return f"{group}={option} is not installed; pip install 'mifo[{extra}]' brings it"
        if group:
            near = nearest(option, options)
            return f"{group}={option} does not exist; {near}use one of: {', '.join(options)}"
    if several := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", str(error)):
        key, values = several.groups()
        return f"{key}={values} has several values; write a list as '{key}=[{values}]', or add -m to try each"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read; close every bracket, and quote a text with special characters "
            "twice: 'key=\"a photo of <asset0>\"'"
        )
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key = cause.full_key
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            if key in _elsewhere(task):
                return useless.format(key)
            if told := renamed(key):
                return told
            near = nearest(key, [name for name, _ in _walk(SCHEMAS[task]())])
            return f"{key} is no key of mifo {task}; {near}see mifo {task} --help"
        if (group := key.rpartition(".")[2]) in ("optimizer", "lr_scheduler"):
            known = ", ".join(sorted(file.stem for file in (conf_folder() / group).glob("*.yaml")))
            return f"{key} is a _target_ with its arguments; choose one by {group}@{key}=OPTION of {known}"
        return f"{key}: {refused(cause)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path, and that it can be written"
    return " ".join(str(error).partition("\nTo append")[0].split())


_FIXES = {
    "converted to Integer": "take a whole number",
    "converted to Float": "take a number",
    "a valid bool": "take true or false",
    "'ListConfig' to string": "take one value",
    "not a ListConfig": "write it as [ONE, OTHER]",
    "merge DictConfig with": "write it as {NAME: VALUE}",
    "incompatible with (str)": "take words as names",
    "Incompatible value 'None'": "give a value, or leave it out for its default",
    "is not Optional": "give a value, or leave it out for its default",
}


def refused(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value that it refuses, and which one to take."""
    said = (error.msg or str(error)).splitlines()[0].rstrip(".").replace("AnyNode", "one value")
    return "; ".join([said, *(fix for part, fix in _FIXES.items() if part in said)])


def _walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key in a tree of dataclasses."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        yield prefix + field.name, value
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{field.name}.")


REFUSALS = (HydraException, OmegaConfBaseException)
