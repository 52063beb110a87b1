"""Where the Hydra configuration lies, where a new run goes, and the scenes by name."""

from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

from mifo.world.drawn import BENCHMARK, STRESS, drawn_settings


def conf_folder() -> Path:
    """`conf/` inside the installed package or, in a checkout, beside it."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def fresh_folder(task: str) -> Path:
    """Where a run of a task goes that names no folder, as conf/hydra/default.yaml has it."""
    return Path("outputs") / task / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")


def scenes_called(pattern: str) -> list[str]:
    """The options of `instances` that fit a pattern in which * is any text; [] where none does.

    They are the files of conf/instances and the drawn scenes of the benchmark. A pattern that fits none of
    them may fit scenes of the stress test, or be the name of any drawn scene.
    """
    files = sorted(path.stem for path in (conf_folder() / "instances").glob("*.yaml"))
    for known in ((*files, *BENCHMARK), STRESS):
        if found := [name for name in known if fnmatch(name, pattern)]:
            return found
    return [pattern] if drawn_settings(pattern) else []
