"""What an acceleration gains: rows measured with it, and with PyTorch's or a library's own in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mifo.acceleration.kernels import computed_by
from mifo.benchmark.measuring import Measurement
from mifo.benchmark.records import AGAIN, BASELINE, WITHOUT
from mifo.benchmark.rows import ROWS, Bench, tried
from mifo.errors import check_known
from mifo.training.settings import adamw


@dataclass(frozen=True)
class Instead:
    """What takes the place of one acceleration.

    Attributes:
        rows: those of the benchmark that it may change.
        others: see `computed_by`. performance: keys of the profile. optimizer: of fine-tuning.
    """

    rows: tuple[str, ...]
    others: Mapping[str, str] = field(default_factory=dict)
    performance: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None

    def measure(self, row: str, bench: Bench) -> Measurement:
        """The row with what takes the acceleration's place; why it failed stands in its notes."""
        finetuning = bench.learning.finetuning
        if self.optimizer:
            finetuning = replace(finetuning, optimizer=dict(self.optimizer))
        changed = replace(
            bench,
            performance=replace(bench.performance, **self.performance),
            learning=replace(bench.learning, finetuning=finetuning),
        )
        with computed_by(self.others):
            return tried(ROWS[row], changed)


NOTHING = Instead(())
STEPS, SECOND = ("stage1_step", "stage2_step"), ("stage2_step",)
PICTURES = ("network", "picture", "three_pictures")
INSTEAD = {
    "group_norm:torch": Instead(STEPS + PICTURES, {"group_norm": "torch"}),
    "group_norm:compiler": Instead(STEPS + PICTURES, {"group_norm": "compiler"}),
    "gated_gelu:torch": Instead(STEPS + PICTURES, {"gated_gelu": "torch"}),
    "gated_gelu:compiler": Instead(STEPS + PICTURES, {"gated_gelu": "compiler"}),
    "bounded_attention:torch": Instead(PICTURES[1:], {"bounded_attention": "torch"}),
    "weight_gradients:torch": Instead(STEPS, {"weight_gradients": "torch"}),
    "adamw_8bit:torch": Instead(SECOND, {"adamw_8bit": "torch"}),
    "adamw_8bit:adamw": Instead(SECOND, optimizer=adamw()),
    "adamw_8bit:bitsandbytes": Instead(SECOND, optimizer={"_target_": "bitsandbytes.optim.AdamW8bit"}),
    "channels_last:no": Instead(STEPS + PICTURES, performance={"channels_last": False}),
    "rounded_weights:autocast": Instead(STEPS, performance={"autocast": True}),
    "cuda_graphs:no": Instead(STEPS + PICTURES, performance={"cuda_graphs": False}),
    "blocks:compiler": Instead(STEPS + PICTURES, performance={"compile": True}),
}


def check_instead(names: Sequence[str]) -> None:
    """Refuse a name that is none of `INSTEAD`."""
    for name in names:
        check_known("benchmark.instead", name, INSTEAD)


def plan(rows: Sequence[str], instead: Sequence[str]) -> dict[str, tuple[str, Instead]]:
    """Rows, by their names in the record: as they are before and after those with something in place."""
    planned: dict[str, tuple[str, Instead]] = {}
    for row in rows:
        others = [name for name in instead if row in INSTEAD[name].rows]
        if not others:
            planned[row] = row, NOTHING
            continue
        planned[f"{row} {BASELINE}"] = row, NOTHING
        planned |= {f"{row}{WITHOUT}{name}": (row, INSTEAD[name]) for name in others}
        planned[f"{row} {BASELINE}{AGAIN}"] = row, NOTHING
    return planned
