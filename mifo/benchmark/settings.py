"""What is measured."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class BenchmarkSettings:
    """One record: some rows, of one profile, on this machine."""

    # of Stable Diffusion 2.1, XL and 3.5, FLUX.2 [klein] 4B, Z-Image or the miniature, with random weights:
    # sd21 | sdxl | sd35 | flux2_klein | z_image | miniature
    shapes: str = "sd21"
    rows: list[str] = field(default_factory=list)  # see conf/benchmark.yaml; empty: all
    # what takes the place of an acceleration, one after the other, such as group_norm:compiler; all are in
    # mifo/benchmark/instead.py. Rows that it may change are measured as they are before and after.
    instead: list[str] = field(default_factory=list)
    folder: str = MISSING  # records, and the table of all records that lie there
    repeats: int = 5  # of a picture; a step is timed `steps` times
    steps: int = 50  # timed steps of a stage, after `warmup`
    warmup: int = 10
    instances: int = 3
    processes: int = 4  # at once, in the row "throughput"
    operations: bool = True  # count floating-point operations too, by an ordinary pass beside the timed ones
