"""`mifo run`: learn, synthesize and evaluate in one folder, and show the result on a contact sheet."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lightning.pytorch.loggers import Logger

from mifo.acceleration.profile import available, ready_for_synthesis
from mifo.commands.evaluate import class_names, print_scores, scored
from mifo.commands.learn import learned_model
from mifo.commands.readiness import LEARNING, Setup, check_ready, layout
from mifo.commands.setup import open_loggers, prepare
from mifo.commands.synthesize import record_instances
from mifo.config.jobs import claim_folder
from mifo.config.schema import RunSettings
from mifo.data.saved_pictures import read_pictures, save_pictures
from mifo.making.pictures import make_pictures
from mifo.metrics.evaluation import SCORES, PictureEvaluator, has_scores
from mifo.report.sheet import Sheet, write_sheet
from mifo.tracking.results import log_evaluation


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Say how long a part took."""
    start = time.monotonic()
    yield
    print(f"{part} took {time.monotonic() - start:.0f} s")


def run(settings: RunSettings) -> Path:
    """Do what is not done yet in the run's folder; returns the folder."""
    setup = Setup(settings)
    instances, wanted = setup.instances, setup.layouts
    if not (Path(settings.paths.output) / "pictures" / "pictures.json").is_file():
        check_ready(setup, (*LEARNING, layout))
    device = prepare(settings)
    folder = Path(settings.paths.output)
    judge = None if has_scores(folder / SCORES) else settings.metrics
    if judge is not None:
        # an evaluator that cannot be loaded is refused now rather than after learning
        PictureEvaluator.from_settings(judge, "cpu")
    claim_folder(settings)
    pictures_wanted = not (folder / "pictures" / "pictures.json").is_file()
    # what is finished was logged by then
    unfinished = pictures_wanted or judge is not None
    opened: AbstractContextManager[list[Logger]] = open_loggers(settings) if unfinished else nullcontext([])
    with opened as loggers:
        if pictures_wanted:
            with timed("learning"):
                model = learned_model(settings, instances, folder, device, loggers)
            performance = available(settings.performance, device)
            ready_for_synthesis(model, performance)
            graphs = performance.cuda_graphs
            with timed("synthesis"):
                made = make_pictures(
                    model, wanted, settings.synthesis, settings.guidance, settings.seed, graphs
                )
            record_instances(folder / "learned", folder / "pictures")
            save_pictures(folder / "pictures", made)
        pictures = read_pictures(folder / "pictures")
        evaluation = None
        if settings.metrics is not None:
            with timed("evaluation"):
                evaluation = scored(settings.metrics, pictures, instances, folder, device)
            steps = settings.learning.finetuning.steps or settings.learning.semantic.steps
            log_evaluation(loggers, evaluation, pictures, instances, steps)
    if settings.sheet and not (folder / "contact_sheet.html").is_file():
        sheet = Sheet(
            title=instances.name.replace("_", " "),
            source=instances.image,
            masks=instances.masks,
            tokens=instances.tokens,
            class_names=class_names(instances),
            pictures=pictures,
            evaluation=evaluation,
            facts={"model": settings.model.name, "method": settings.method, "seed": str(settings.seed)},
        )
        write_sheet(folder, sheet)
    if evaluation is not None:
        print_scores(evaluation.scores)
    for form in ("png", "html") if settings.sheet else ():
        print(f"contact sheet: {folder / f'contact_sheet.{form}'}")
    return folder
