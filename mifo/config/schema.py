"""What the configuration of each task may hold: every key, its type and its default.

Settings of a part stand beside the code that reads them; only what belongs to no part stands here.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.settings import ModelSettings
from mifo.benchmark.settings import BenchmarkSettings
from mifo.data.layouts import LayoutSettings
from mifo.data.settings import InstancesSettings
from mifo.exporting.settings import ExportSettings
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.metrics.settings import MetricsSettings
from mifo.miniature.pretraining.settings import PretrainSettings
from mifo.training.settings import LearningSettings


@dataclass
class PathsSettings:
    """Folders. `output` is this run's own, chosen by Hydra; it is never shared by two runs."""

    output: str = MISSING
    outputs: str = "outputs"
    multirun: str = "multirun"


@dataclass
class Origin:
    """Where a run comes from: recorded when it begins, and shown by loggers and `mifo results`."""

    choices: dict[str, str] = field(default_factory=dict)  # group → option
    overrides: list[str] = field(default_factory=list)  # what was typed
    sweep: str | None = None  # its folder
    swept: list[str] = field(default_factory=list)  # the keys that it varies
    table: str | None = None  # that made the run, with the run's row and set of scenes
    row: str | None = None
    set: str | None = None
    code: str | None = None  # commit, or version and digest of the package; see `CodeVersion.name`
    dirty: bool | None = None  # changes were not committed; None: no git knows

    @property
    def place(self) -> dict[str, str | None]:
        """Where in a table a run stands."""
        return {"table": self.table, "row": self.row, "set": self.set}


@dataclass
class TaskSettings:
    """What every task knows."""

    task: str = MISSING
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    exclusive_gpu: bool = False  # take a GPU that no other job of this host has, as hydra/launcher=gpus does
    # for the logger: runs that differ by their seed alone share it
    group: str | None = None
    tags: list[str] = field(default_factory=list)  # for the logger, and for finding runs again
    again: bool = False  # in a sweep: make also what is done already
    resume: str | None = None  # the folder of an interrupted run to continue, with that run's configuration
    paths: PathsSettings = field(default_factory=PathsSettings)
    origin: Origin = field(default_factory=Origin)  # MIFO fills it in


@dataclass
class ModelTaskSettings(TaskSettings):
    """A task that loads a diffusion model."""

    # the options of the group give these, or leave them to the user
    model: ModelSettings = field(default_factory=lambda: ModelSettings(name=MISSING, source=MISSING))
    performance: PerformanceSettings = field(default_factory=PerformanceSettings)


@dataclass
class LearnSettings(ModelTaskSettings):
    """`mifo learn`."""

    method: str = "mifo"  # the name that tables and loggers show for this choice of losses and rates
    instances: InstancesSettings = field(default_factory=InstancesSettings)
    learning: LearningSettings = field(default_factory=LearningSettings)
    penalty: PenaltySettings = field(default_factory=PenaltySettings)
    trainer: dict[str, Any] = field(default_factory=dict)  # arguments of lightning.Trainer
    callbacks: dict[str, Any] = field(default_factory=dict)  # name → `_target_` and arguments
    logger: dict[str, Any] = field(default_factory=dict)  # name → `_target_` and arguments
    # for the pictures that callbacks make while learning, and in `mifo run` for those made afterwards
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    metrics: MetricsSettings | None = field(default_factory=MetricsSettings)  # None: no scores

    @property
    def told_method(self) -> str:
        """The method with what was typed to change its parts, as `mifo, penalty=none`."""
        parts, place = ("penalty", "learning", "recipe", "optimizer", "lr_scheduler"), "learning.prior.cache="
        typed = [text.lstrip("+") for text in self.origin.overrides if not text.lstrip("+").startswith(place)]
        changed = [text for text in typed if re.split("[.@=]", text.lstrip("~"))[0] in parts]
        return ", ".join([self.method, *changed])

    def told_result(self, instances: str) -> str:
        """What the words and weights learned of these instances are called among those of other runs."""
        return f"{instances}-{self.method}-seed-{self.seed}"


@dataclass
class SynthesizeSettings(ModelTaskSettings):
    """`mifo synthesize`."""

    # the folder `learned/` of a run of `mifo learn`, or that run's folder; a list for what was learned apart
    learned: Any = MISSING
    layout: LayoutSettings = field(default_factory=lambda: LayoutSettings(prompt=MISSING))
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)


@dataclass
class ExportTaskSettings(ModelTaskSettings, ExportSettings):
    """`mifo export`."""

    learned: str = MISSING  # the folder `learned/` of a run of `mifo learn`, or that run's folder


@dataclass
class MasksSettings(TaskSettings):
    """`mifo masks`. Boxes and points are in shares of the picture."""

    picture: str | None = None  # the picture that boxes and points are in
    boxes: dict[str, Any] = field(default_factory=dict)  # name → [x0, y0, x1, y1], or a list of such
    points: dict[str, Any] = field(default_factory=dict)  # name → [[x, y], …]; [x, y, 0] is beside the thing
    segmenter: str = "facebook/sam2.1-hiera-small"  # a folder or hub id of Segment Anything 2 (184 MB)
    instances: InstancesSettings | None = None  # instead: show the masks that these have


@dataclass
class EvaluateSettings(TaskSettings):
    """`mifo evaluate`."""

    pictures: str = MISSING  # the folder `pictures/` of a run of `mifo synthesize`, or that run's folder
    instances: InstancesSettings | None = None  # None: those that the pictures' tokens were learned from
    metrics: MetricsSettings | None = field(default_factory=MetricsSettings)  # None: no scores
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunSettings(LearnSettings):
    """`mifo run`: learn, synthesize and evaluate in one folder."""

    layout: LayoutSettings = field(default_factory=lambda: LayoutSettings(prompt=MISSING))
    objectives: list[str] = field(default_factory=list)  # scores that a search (hparams_search) reads
    sheet: bool = True  # end with a contact sheet; false spares a series of runs the time


@dataclass
class SpeedrunSettings(RunSettings):
    """`mifo speedrun`: what `mifo run` would be given, and the target."""

    every: int = 40  # steps of each stage between two looks at pictures; the last step is looked at too
    identification: float = 0.95  # at least, in [0, 1]
    leakage: float = 0.10  # at most, in [0, 1]
    leaderboard: str = "experiments/speedrun/leaderboard.csv"  # gets a row


@dataclass
class DashboardSettings(TaskSettings):
    """`mifo dashboard`."""

    entity: str = MISSING  # the user or team on Weights & Biases
    project: str = "mifo"
    group_by: Any = "method"  # the choice or setting whose values are compared, or several: [penalty,seed]
    table: str | None = None  # a folder of experiments/ whose rows are compared, in the table's columns
    results: str | None = None  # where the table was written; None: the newest of outputs/tables


@dataclass
class LayoutTaskSettings(TaskSettings):
    """`mifo layout`: draw the boxes of a layout."""

    instances: InstancesSettings = field(default_factory=InstancesSettings)
    layout: LayoutSettings = field(default_factory=lambda: LayoutSettings(prompt=MISSING))
    picture: str | None = None  # drawn over this picture; None: over an empty canvas


@dataclass
class StudioSettings(TaskSettings):
    """`mifo studio`."""

    folder: str = "studio"  # where photos, masks and layouts are kept; runs go to outputs/, as always
    segmenter: str = MasksSettings.segmenter  # makes masks of clicks
    host: str = "127.0.0.1"  # who may open the page: this machine alone; there is no password
    port: int = 7860
    browser: bool = True  # open the page there


@dataclass
class PretrainTaskSettings(TaskSettings):
    """`mifo pretrain`."""

    pretraining: PretrainSettings = field(default_factory=PretrainSettings)
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass
class CalibrateSettings(TaskSettings):
    """`mifo calibrate`."""

    scenes: list[str] = field(default_factory=lambda: ["alike_*", "mixed_*", "rare_*"])  # of conf/instances
    endings: list[str] = field(default_factory=lambda: ["at the beach", "in the jungle", "in the snow"])
    metrics: MetricsSettings = field(default_factory=MetricsSettings)


@dataclass
class QualitySettings(TaskSettings):
    """`mifo quality`."""

    parts: list[str] = field(
        default_factory=lambda: ["reconstruction", "evaluators", "text_to_image", "box_control"]
    )
    weights: str | None = None  # a folder weights/ of `mifo pretrain`; None: the embedded ones
    pipeline: str = "pipeline"  # in it: pipeline has a U-Net, pipeline_mmdit a transformer
    reconstructions: int = 512  # scenes
    scenes: int = 4096  # for the image-text evaluator
    per_category: int = 100  # instances among which the image evaluator finds each one
    pictures: int = 960  # of one thing; half as many of two
    box_prompts: int = 200
    box_seed: int | None = None  # of their scenes, to choose settings on others; None: the record's
    performance: PerformanceSettings = field(default_factory=PerformanceSettings)  # of box control
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)


@dataclass
class BenchmarkTaskSettings(ModelTaskSettings):
    """`mifo benchmark`. Rows read the dtype of `model`, and set the numbers of steps, except both_stages."""

    model: ModelSettings = field(default_factory=ModelSettings)
    learning: LearningSettings = field(default_factory=LearningSettings)
    penalty: PenaltySettings = field(default_factory=PenaltySettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)


SCHEMAS: dict[str, type[TaskSettings]] = {
    "learn": LearnSettings,
    "synthesize": SynthesizeSettings,
    "export": ExportTaskSettings,
    "masks": MasksSettings,
    "evaluate": EvaluateSettings,
    "run": RunSettings,
    "speedrun": SpeedrunSettings,
    "doctor": RunSettings,
    "dashboard": DashboardSettings,
    "layout": LayoutTaskSettings,
    "studio": StudioSettings,
    "pretrain": PretrainTaskSettings,
    "benchmark": BenchmarkTaskSettings,
    "calibrate": CalibrateSettings,
    "quality": QualitySettings,
}
