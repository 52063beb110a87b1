"""Where the Hydra configuration lies, and the scenes by name."""

from fnmatch import fnmatch
from pathlib import Path

from mifo.world.drawn import BENCHMARK, drawn_settings


def conf_folder() -> Path:
    """`conf/` inside the installed package or, in a checkout, beside it."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def scenes_called(pattern: str) -> list[str]:
    """The options of `instances` that fit a pattern in which * is any text; [] where none does.

    They are the files of conf/instances, the drawn scenes of the benchmark, and any drawn scene by its name.
    """
    known = [*sorted(path.stem for path in (conf_folder() / "instances").glob("*.yaml")), *BENCHMARK]
    found = [name for name in known if fnmatch(name, pattern)]
    return found or [pattern] * (drawn_settings(pattern) is not None)
