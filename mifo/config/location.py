"""Where the Hydra configuration lies."""

from pathlib import Path


def conf_folder() -> Path:
    """`conf/` inside the installed package or, in a checkout, beside it."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"
