"""Lightning's logger for Trackio, which keeps curves, pictures and tables in a dashboard on this machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from mifo.errors import check_package
from mifo.files import write_whole
from mifo.tracking.index import flat

_BEGUN = "trackio.txt"  # in the folder of a run that Trackio knows: its name there


class TrackioLogger(Logger):
    """Sends to Trackio what a run logs; a run that goes on in its `folder` goes on in the dashboard.

    Needs the extra `trackio`. `TRACKIO_DIR` says where the dashboard's files lie.

    Raises:
        MifoError: Trackio is not installed.
    """

    def __init__(self, project: str, name: str, folder: str, group: str | None = None) -> None:
        super().__init__()
        check_package("logger=trackio", "trackio", "trackio")
        self._project, self._name, self._group = project, name, group
        self._folder = Path(folder)
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._project

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Begin the run with its configuration, whose keys are dotted as on the command line."""
        import trackio

        begun = (self._folder / _BEGUN).is_file()
        self._run = trackio.init(
            self._project,
            self._name,
            self._group,
            config=dict(flat(params)),
            resume="allow" if begun else "never",
            embed=False,
            auto_log_cpu=False,
        )
        write_whole(self._folder / _BEGUN, self.name)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._run.log({key: value for key, value in metrics.items() if key != "epoch"}, step=step)

    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Send pictures, of which each is shown under `key`."""
        import trackio

        for image in images:
            self._run.log({key: trackio.Image(image)}, step=step)

    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
        """Send a table; cells that are pictures are shown."""
        import trackio

        rows = [
            [trackio.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in data
        ]
        self._run.log({key: trackio.Table(columns=list(columns), data=rows)})

    def close(self) -> None:
        """End the run; Lightning calls `finalize` after each stage."""
        if self._run is not None:
            self._run.finish()
