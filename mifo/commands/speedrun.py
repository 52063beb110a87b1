"""`mifo speedrun`: seconds of learning until pictures of held-out prompts are good, on a leaderboard."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd

from mifo.backbones.loading import load_model
from mifo.benchmark.records import Circumstances
from mifo.callbacks.speedrun import Reached, Stopwatch
from mifo.commands.readiness import LEARNING, Setup, check_ready, layout
from mifo.commands.setup import prepare
from mifo.config.identity import told_code
from mifo.config.jobs import claim_folder
from mifo.config.schema import SpeedrunSettings
from mifo.errors import MifoError
from mifo.files import LOCKLESS, check_room, finite_number, read_csv, refuse_existing
from mifo.making.pictures import make_pictures
from mifo.metrics.evaluation import PictureEvaluator
from mifo.report.tables import write_csv
from mifo.training.fit import CHECKPOINTS, learn

NUMBERS = ("seconds", "step", "identification", "leakage", "seed")
TEXTS = ("stage", "date", "commit", "device", "torch", "overrides")


def speedrun(settings: SpeedrunSettings) -> Path:
    """Learn until the target is reached, and add a row to the leaderboard; returns the leaderboard.

    The clock includes the class pictures, which are made anew, and leaves out loading the model and judging.

    Raises:
        MifoError: no step to look at, one instance alone, no evaluator, a leaderboard that is damaged or
            cannot be written, or learning ends before the target is reached.
    """
    if settings.every < 1:
        raise MifoError(f"every={settings.every} leaves no step to look at pictures; take at least 1")
    setup = Setup(settings)
    check_ready(setup, (*LEARNING, layout))
    if settings.metrics is None or len(setup.instances.tokens) < 2:
        raise MifoError(
            "a speedrun needs metrics, and two instances or more that can be taken for each other"
        )
    if not all(each.boxes for each in setup.layouts):
        raise MifoError(
            "a speedrun looks at instances in their boxes; take a layout that has boxes, such as row"
        )
    if (cache := settings.learning.prior.cache) is None:
        raise MifoError("learning.prior.cache=null takes class pictures that are not timed; leave it out")
    board = Path(settings.leaderboard)
    if board.is_dir():
        raise MifoError(f"leaderboard={board} is a folder; name a file, such as {board / 'leaderboard.csv'}")
    check_room(board.parent, 2**20)
    _read_board(board)
    device, folder = prepare(settings), claim_folder(settings)
    for made in (folder / CHECKPOINTS, cache):  # no clock would count what is there
        refuse_existing(made)
    evaluator = PictureEvaluator.from_settings(settings.metrics, device)
    model = load_model(settings.model, device)
    make = partial(
        make_pictures, settings=settings.synthesis, guidance=settings.guidance, seed=settings.seed, bar=False
    )
    watch = Stopwatch(
        make, settings.layout, evaluator, settings.every, settings.identification, settings.leakage
    )
    try:
        learn(
            model,
            setup.instances,
            settings.learning,
            settings.penalty,
            folder,
            seed=settings.seed,
            trainer=settings.trainer,
            callbacks=[watch],
            performance=settings.performance,
        )
    except Reached:
        pass
    else:
        best = max(watch.looks, key=lambda look: (look.identification, -look.leakage))
        raise MifoError(
            f"the target was not reached; the best was identification {best.identification:.3f} and leakage "
            f"{best.leakage:.3f} at {best.stage} {best.step}; take more steps or other settings"
        )
    here = Circumstances.now(device, settings.performance.name, settings.model.name, told_code())
    look = watch.looks[-1]
    row = {
        "seconds": round(look.seconds, 1),
        "stage": look.stage,
        "step": look.step,
        "identification": round(look.identification, 4),
        "leakage": round(look.leakage, 4),
        "date": here.date,
        "commit": here.commit,
        "device": here.device,
        "torch": here.versions["torch"],
        "seed": settings.seed,
        "overrides": " ".join(settings.origin.overrides),
    }
    with alone(board):  # read again: another speedrun may have added a row meanwhile
        write_csv(board, pd.DataFrame([*_read_board(board), row]), digits=4)
    print(f"{row['seconds']} s on {here.device}: {board}")
    return board


@contextmanager
def alone(board: Path) -> Iterator[None]:
    """Wait until no other speedrun writes the leaderboard, and keep others waiting."""
    lock = board.with_name(f".{board.name}.lock")
    with lock.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
        yield


def _read_board(board: Path) -> list[dict[str, str]]:
    """The rows of a leaderboard as they stand there, if it exists; refuses damage and what is no number."""

    def number(text: str) -> str:
        finite_number(text)
        return text

    if not board.exists():
        return []
    return read_csv(board, dict.fromkeys(NUMBERS, number) | dict.fromkeys(TEXTS, str))
