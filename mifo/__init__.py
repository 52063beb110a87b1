"""Multi-concept image synthesis from single images, learned with MIFO.

The commands are functions here. They take what the command line takes, with its defaults:

    learned = mifo.learn("model=sd15", "instances=local", instances={"folder": "my_photo"})
    pictures = mifo.synthesize(learned=learned, model="sd15", synthesis={"samples": 4})
    scores = mifo.evaluate(pictures=pictures, metrics="sd15")

`folder=…` names a run's own folder, which is outputs/TASK/DATE_TIME otherwise. What is refused raises
`mifo.errors.MifoError`.
"""

import os
from typing import Any

# Read when torch is imported. Threads that wait for each other spin for thirty times as long otherwise,
# and take the core from those they wait for where other processes are busy (experiments/benchmark/tried.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def learn(*overrides: str, **keys: Any) -> Any:
    """Learn the instances of one image; returns the folder of what was learned (`mifo learn`)."""
    return _call("learn", overrides, keys)


def synthesize(*overrides: str, **keys: Any) -> Any:
    """Make pictures with the learned instances; returns their folder (`mifo synthesize`)."""
    return _call("synthesize", overrides, keys)


def evaluate(*overrides: str, **keys: Any) -> Any:
    """Score pictures; returns `mifo.metrics.scores.Evaluation` (`mifo evaluate`)."""
    return _call("evaluate", overrides, keys)


def run(*overrides: str, **keys: Any) -> Any:
    """Learn, synthesize and evaluate; returns the folder with the contact sheet (`mifo run`)."""
    return _call("run", overrides, keys)


def _call(task: str, overrides: tuple[str, ...], keys: dict[str, Any]) -> Any:
    from mifo.calls import call  # late, so that importing mifo loads no library

    return call(task, overrides, keys)
