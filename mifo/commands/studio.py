"""`mifo studio`: masks, learning, boxes and pictures in the browser."""

from pathlib import Path

from mifo.config.schema import StudioSettings
from mifo.errors import MifoError, check_package


def studio(settings: StudioSettings) -> None:
    """Serve the studio until it is stopped.

    Raises:
        MifoError: gradio is missing, or the port is taken.
    """
    check_package("mifo studio", "gradio", "studio")
    # imported here, since gradio is an extra
    from mifo.studio.page import Studio, serve

    try:
        serve(
            Studio(Path(settings.folder), settings.segmenter), settings.host, settings.port, settings.browser
        )
    except OSError as error:
        raise MifoError(
            f"host={settings.host} port={settings.port} is taken; take another, as port=7861."
        ) from error
