"""Pages of pictures: what the rows of a table made of one scene with one seed."""

import logging
from collections.abc import Mapping, Sequence

from PIL import Image

from mifo.data.instances import read_instances
from mifo.data.saved_pictures import read_pictures
from mifo.errors import MifoError
from mifo.report.comparison import ComparedRow, draw_comparison
from mifo.tables.collect import Measured
from mifo.tables.execute import Done

PICTURES = 5  # of each row

log = logging.getLogger(__name__)


def draw_pages(
    finished: Sequence[Done],
    runs: Sequence[Measured],
    columns: Sequence[str],
    scenes: Sequence[str] | None,
    title: str,
) -> dict[str, Image.Image]:
    """A page for each set of scenes: the scene and seed of which most rows have pictures, first of equals.

    Args:
        finished: runs of a table; those that have pictures no longer, or were made elsewhere, are left out.
        runs: what was measured of each of them.
        columns: scores that stand beside the pictures.
        scenes: names of instances that may be shown; None: any.

    Returns:
        Pages by name of the set, none for a set without pictures.
    """
    found: dict[str, dict[tuple[str, int], list[tuple[Done, Mapping[str, float]]]]] = {}
    for done, measured in zip(finished, runs, strict=True):
        run = done.run
        pictures = done.folder and done.folder / "pictures"
        if pictures and pictures.is_dir() and (scenes is None or run.instances in scenes):
            same = found.setdefault(run.scenes, {}).setdefault((run.instances, run.seed), [])
            same.append((done, measured.values))
    pages = {}
    for name, choices in found.items():
        (scene, seed), chosen = max(choices.items(), key=lambda item: len(item[1]))
        try:
            pages[name] = _page(f"{title}: {scene.replace('_', ' ')}, seed {seed}", chosen, columns)
        except MifoError as error:  # files of the user that are gone since; the table stands without
            log.warning("No page of pictures of %s: %s", name, error)
    return pages


def _page(
    title: str, chosen: Sequence[tuple[Done, Mapping[str, float]]], columns: Sequence[str]
) -> Image.Image:
    """The pictures of runs of one scene and seed, of those with the first one's prompts."""
    rows = [
        ComparedRow(
            done.run.row,
            read_pictures(done.folder / "pictures")[:PICTURES],
            {metric: values[metric] for metric in columns if metric in values},
        )
        for done, values in chosen
        if done.folder is not None
    ]
    prompts = [picture.prompt for picture in rows[0].pictures]
    rows = [row for row in rows if [picture.prompt for picture in row.pictures] == prompts]
    settings = chosen[0][0].run.settings
    assert settings is not None  # its pictures are there
    learned = read_instances(settings.instances)
    return draw_comparison(title, learned.image, learned.masks, learned.tokens, rows)
