"""`mifo tune experiments/NAME`: the same budget of trials for every method of a folder's tune.yaml."""

from collections.abc import Sequence
from pathlib import Path

from mifo.config.launch import launcher
from mifo.tables.asked import of_hydra, wants_own_gpu
from mifo.tables.record import read_record
from mifo.tables.tuning import Trial, best_trials, read_tuning, write_tuning
from mifo.tables.tuning import tune as search
from mifo.tables.write import claim_results


def tune(arguments: list[str]) -> int:
    """Run the command; returns how many methods have no finished trial.

    Raises:
        MifoError: the folder's tune.yaml cannot be read, its runs cannot be compared, or the results
            of another tuning stand in its place.
    """
    given, *others = arguments
    hydra, changes = of_hydra(others)
    folder = Path(given)
    settings, overrides = read_tuning(folder, changes)
    name = folder.resolve().name
    target = Path(settings.results or f"outputs/tuning/{name}")
    launch = launcher("mifo.tables.execute.make_runs", hydra, target, wants_own_gpu(overrides))
    record = read_record(Path(settings.record)) if settings.record else {}
    claim_results(target, settings, overrides, "tune")
    trials: list[Trial] = []
    for trials, made in search(name, settings, overrides, launch, record):
        _tell(trials[-len(settings.methods) :])
        write_tuning(target, settings, trials, made)
    print(f"tuned: {target / 'chosen.yaml'}")
    return len(settings.methods) - len(best_trials(trials))


def _tell(trials: Sequence[Trial]) -> None:
    for trial in trials:
        told = "failed" if trial.objective is None else f"{trial.objective:.3f}"
        print(f"{trial.method}, trial {trial.number}: {told} ({', '.join(trial.overrides)})", flush=True)
