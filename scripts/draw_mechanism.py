"""Draw what `callbacks=mechanism logger=csv` logged in several runs: where words attend, and gradient shares.

    mifo run method=mifo callbacks=mechanism logger=csv hydra.run.dir=A
    python scripts/draw_mechanism.py mechanism.png MIFO=A LABEL=RUN_FOLDER …

A row for each stage. Curves of runs with one label are averaged.
"""

import sys
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

STAGES = ("semantic", "finetuning")
SHARES = ("own", "others", "attention / all")
LINES = ("-", "--", ":", "-.")  # two runs may share a curve: both can be seen
TITLES = {
    "own": "attention inside the own instance",
    "others": "attention inside other instances",
    "attention / all": "the attention loss's share of gradients",
}


def curves(folder: Path) -> pd.DataFrame:
    """Step, stage and the shares that one run logged."""
    logged = pd.concat(pd.read_csv(file) for file in sorted((folder / "csv").rglob("metrics.csv")))
    found = []
    for stage in STAGES:
        prefix = f"{stage}/mechanism/"
        own = logged[["step", *(key for key in logged if key.startswith(prefix))]].dropna()
        own.columns = [key.removeprefix(prefix) for key in own]
        norms = own[["denoising", "prior", "attention"]]
        found.append(own.assign(stage=stage, **{"attention / all": norms.attention / norms.sum(axis=1)}))
    return pd.concat(found)


def draw(runs: pd.DataFrame, path: str) -> None:
    figure, axes = plt.subplots(len(STAGES), len(SHARES), figsize=(12, 6), constrained_layout=True)
    for row, stage in zip(axes, STAGES, strict=True):
        for axis, name in zip(row, SHARES, strict=True):
            part = runs[runs.stage == stage].pivot_table(
                index="step", columns="label", values=name, sort=False
            )
            for label, line in zip(part, cycle(LINES)):
                axis.plot(part.index, part[label], line, label=label, linewidth=2)
            axis.set(title=f"{stage}: {TITLES[name]}", xlabel="step", ylim=(0, None))
            axis.title.set_size(9)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    target, *given = sys.argv[1:]
    named = [text.partition("=")[::2] for text in given]
    draw(pd.concat([curves(Path(folder)).assign(label=label) for label, folder in named]), target)
    print(target)
