"""Every experiment and every method composes, and each method runs dry."""

import pytest
from tiny import tiny_pipeline

from mifo.config import compose, conf_folder, settings_of
from mifo.config.checks import check
from mifo.tasks.run import run


def options(group):
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    "override", [f"{group}={o}" for group in ("experiment", "method") for o in options(group)]
)
def test_it_runs_dry(override, source, tmp_path):
    tiny = [
        "model=local",
        f"model.source={source}",
        "debug=fast_dev_run",
        "metrics=none",
        "logger=none",
        "device=cpu",
    ]
    settings = settings_of(compose("run", [override, *tiny, f"paths.output={tmp_path / 'run'}"]))
    check(settings)
    assert (run(settings) / "contact_sheet.png").is_file()
