"""`mifo run`: learn, synthesize and evaluate in one folder, and show the result on a contact sheet."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lightning.pytorch.loggers import Logger

from mifo.commands.evaluate import print_scores, scored
from mifo.commands.learn import learned_model
from mifo.commands.readiness import LEARNING, Setup, check_ready, layout
from mifo.commands.setup import open_loggers, prepare
from mifo.commands.synthesize import make_and_save, record_instances, refuse_foreign
from mifo.config.jobs import claim_folder
from mifo.config.schema import RunSettings
from mifo.data.saved_pictures import read_pictures
from mifo.metrics.evaluation import PictureEvaluator
from mifo.metrics.scores import SCORES, has_scores
from mifo.report.sheet import Sheet, write_sheet
from mifo.tracking.results import at_no_cost, log_evaluation


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Say how long a part took."""
    start = time.monotonic()
    yield
    print(f"{part} took {time.monotonic() - start:.0f} s")


def run(settings: RunSettings) -> Path:
    """Do every step that is not finished in the run's folder; returns the folder."""
    setup = Setup(settings)
    instances, wanted = setup.instances, setup.layouts
    folder = Path(settings.paths.output)
    refuse_foreign(folder / "pictures")
    pictures_wanted = not (folder / "pictures" / "pictures.json").is_file()
    if pictures_wanted:
        check_ready(setup, (*LEARNING, layout))
    device = prepare(settings)
    judge = None if has_scores(folder / SCORES) else settings.metrics
    if judge is not None:
        # an evaluator that cannot be loaded is refused now rather than after learning
        PictureEvaluator.from_settings(judge, "cpu")
    claim_folder(settings)
    opened: AbstractContextManager[list[Logger]] = nullcontext([])
    if pictures_wanted or judge is not None:  # else everything was logged when it was finished
        opened = open_loggers(settings)
    with opened as loggers:
        if pictures_wanted:
            with timed("learning"):
                model = learned_model(settings, instances, folder, device, loggers)
            record_instances(folder / "learned", folder / "pictures")
            with timed("synthesis"):
                make_and_save(model, settings, wanted, folder / "pictures")
        pictures = read_pictures(folder / "pictures")
        evaluation = None
        if settings.metrics is not None:
            with timed("evaluation"):
                evaluation = scored(settings.metrics, pictures, instances, folder, device)
            with at_no_cost():
                log_evaluation(loggers, evaluation, pictures, instances, settings.learning.last_step)
    if settings.sheet and not (folder / "contact_sheet.html").is_file():
        sheet = Sheet(
            title=instances.name.replace("_", " "),
            source=instances.image,
            masks=instances.masks,
            tokens=instances.tokens,
            class_names=instances.class_names or (None,) * len(instances.tokens),
            pictures=pictures,
            evaluation=evaluation,
            facts={
                "model": settings.model.name,
                "seed": str(settings.seed),
                "method": settings.told_method,  # last, since it may be long
            },
        )
        write_sheet(folder, sheet)
    if evaluation is not None:
        print_scores(evaluation.scores)
    for form in ("png", "html") if settings.sheet else ():
        print(f"contact sheet: {folder / f'contact_sheet.{form}'}")
    return folder
