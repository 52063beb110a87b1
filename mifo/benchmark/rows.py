"""The rows of the benchmark: each measures one thing and needs nothing of the others."""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning import Callback
from torch import nn
from torchvision.transforms.functional import to_pil_image

from mifo.acceleration.profile import available, ready_for_synthesis
from mifo.acceleration.settings import PerformanceSettings
from mifo.benchmark.measuring import (
    LearningEnd,
    Losses,
    Measurement,
    Memory,
    StepTimes,
    measured,
    peak_tera_operations,
    stopwatch,
    tera_operations,
)
from mifo.benchmark.records import Record
from mifo.benchmark.settings import BenchmarkSettings
from mifo.benchmark.shapes import find_shapes, random_instances, random_model, row_of_boxes
from mifo.data.layouts import Layout
from mifo.errors import MifoError, first_line
from mifo.files import read_record
from mifo.making.pictures import make_pictures, picture_sampler
from mifo.method.guidance.settings import GuidanceSettings
from mifo.method.losses.settings import PenaltySettings
from mifo.method.prompts.instances import instance_tokens
from mifo.method.synthesis.settings import SynthesisSettings
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings, adamw, adamw_8bit
from mifo.training.targets import make_optimizer


@dataclass
class Bench:
    """What a row may ask for.

    Attributes:
        dtype: of U-Net and text encoder when they are loaded.
        learning, penalty: how it is learned; most rows set the numbers of steps.
        typed: the overrides of the command line, for rows that start processes.
        peak: 10¹² operations a second of this machine, once it is measured.
    """

    settings: BenchmarkSettings
    performance: PerformanceSettings
    device: torch.device
    dtype: str
    learning: LearningSettings
    penalty: PenaltySettings
    typed: Sequence[str] = ()
    peak: dict[str, float] = field(default_factory=dict)

    def learn(
        self,
        steps: tuple[int, int],
        callbacks: Sequence[Callback],
        performance: PerformanceSettings | None = None,
        penalty: PenaltySettings | None = None,
        seed: int = 0,
        instances: int | None = None,
        side: int | None = None,
    ) -> tuple[float, float]:
        """Learn random instances for so many steps of both stages, and throw the result away.

        Returns:
            When learning began and when its result was saved, by `time.perf_counter`; before it the model
            and the class pictures are made.
        """
        count = instances or self.settings.instances
        model = random_model(self.settings.shapes, self.device, self.dtype, side)
        learning = replace(
            self.learning,
            semantic=_stage(self.learning.semantic, steps[0]),
            finetuning=_stage(self.learning.finetuning, steps[1]),
        )
        with tempfile.TemporaryDirectory() as folder:
            if steps[1]:
                noise_pictures(Path(folder) / "prior", self.learning.prior.pictures, model.image_size)
            learning.prior = replace(learning.prior, folder=f"{folder}/prior")
            start = perf_counter()
            learn(
                model,
                random_instances(count, model.image_size),
                learning,
                penalty or self.penalty,
                folder,
                seed=seed,
                trainer={"accelerator": self.device.type, "devices": 1, "enable_progress_bar": False},
                callbacks=callbacks,
                performance=performance or self.performance,
            )
            return start, perf_counter()

    def pictures(
        self, samples: int, boxes: int, repeats: int, side: int | None = None, operations: bool = True
    ) -> Measurement:
        """Pictures of one prompt with boxes, from the prompt to the image on the processor.

        With `operations` their floating-point operations are counted, where the settings want it.
        """
        performance = available(self.performance, self.device)
        model = random_model(self.settings.shapes, self.device, self.dtype, side)
        tokens = instance_tokens(boxes)
        model.add_words(tokens)
        ready_for_synthesis(model, performance)
        layout = Layout(
            f"a photo of {' and '.join(tokens)}", dict(zip(tokens, row_of_boxes(boxes), strict=True))
        )
        usual = SynthesisSettings()
        distilled = find_shapes(self.settings.shapes).sampling
        steps, scale = distilled or (usual.steps, usual.guidance_scale)
        settings = SynthesisSettings(steps=steps, guidance_scale=scale, samples=samples)
        guidance = GuidanceSettings()
        if steps < usual.steps:  # the same share of the steps is guided
            guided = math.ceil(guidance.guided_steps * steps / usual.steps)
            guidance = replace(guidance, guided_steps=guided, shapes_from=guided, shapes_every=1)
        sampler = picture_sampler(model, settings, guidance, performance.cuda_graphs)

        def make() -> None:
            make_pictures(model, [layout], settings, guidance, 0, sampler=sampler, bar=False)

        stopwatch(self.device, make)  # compiles kernels
        sampler = picture_sampler(model, settings, guidance, performance.cuda_graphs)
        first = stopwatch(self.device, make)
        memory = Memory(self.device)
        row = measured([stopwatch(self.device, make) for _ in range(repeats)], memory.peak_gib())
        if self.settings.operations and operations:
            # our own kernels, whose operations torch does not see, do not take 64 bits
            nn.Module.to(model.denoiser, torch.float64)
            row.tflop = tera_operations(
                lambda: make_pictures(model, [layout], settings, guidance, 0, bar=False)
            )
            row.share_of_peak = self.share(row, performance.synthesis_precision)
        row.notes["first of its kind in a process, graphs captured"] = first
        iterations = guidance.guided_steps * guidance.iterations
        row.notes["guidance"] = f"random weights rarely fall below its threshold: all {iterations} iterations"
        row.notes["steps"] = steps
        return row

    def share(self, row: Measurement, precision: str) -> float:
        """The row's operations a second, of those that a large matrix product reaches here."""
        if precision not in self.peak:
            self.peak[precision] = peak_tera_operations(self.device, getattr(torch, precision))
        assert row.tflop is not None and row.seconds is not None
        return row.tflop / row.seconds / self.peak[precision]


def _stage(settings: StageSettings, steps: int) -> StageSettings:
    return replace(settings, steps=steps, checkpoint_every=0)


def noise_pictures(folder: Path, count: int, side: int) -> None:
    """Write so many pictures of noise into a new folder, `side` pixels wide and high."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        to_pil_image(torch.rand(3, side, side, generator=generator)).save(folder / f"{i}.png")


class _Operations(Callback):
    """Operations of a forward and backward pass on the batch of the first step."""

    def __init__(self) -> None:
        self.tflop = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 0:
            with torch.random.fork_rng():
                self.tflop = tera_operations(lambda: module.eager_step(batch).backward())
            module.zero_grad()


def _step(bench: Bench, stage: int, operations: bool = True, **options: Any) -> Measurement:
    """A step of one stage within the trainer; `operations` are counted where the settings want it too."""
    steps = bench.settings.warmup + bench.settings.steps
    counted, times, memory = _Operations(), StepTimes(bench.settings.warmup), Memory(bench.device)
    both = (steps, 0) if stage == 1 else (0, steps)
    bench.learn(both, [times], **options)
    row = measured(times.seconds, memory.peak_gib())
    if bench.settings.operations and operations:
        # the model's own: what checkpointing computes a second time is not counted, nor could torch count it
        once = replace(bench.performance, gradient_checkpointing=False)
        bench.learn((min(both[0], 1), min(both[1], 1)), [counted], once, **options)
        row.tflop = counted.tflop
        row.share_of_peak = bench.share(row, available(bench.performance, bench.device).learning_precision)
    return row


def matrix_product(bench: Bench) -> Measurement:
    """What the machine can do: a large matrix product in the precision of learning."""
    precision = available(bench.performance, bench.device).learning_precision
    bench.peak[precision] = peak_tera_operations(bench.device, getattr(torch, precision))
    return Measurement(notes={"precision": precision, "tflop_per_second": bench.peak[precision]})


def stage1_step(bench: Bench) -> Measurement:
    """One step of semantic learning."""
    return _step(bench, 1)


def stage2_step(bench: Bench) -> Measurement:
    """One step of fine-tuning, one class picture and one instance picture; on large models of adapters."""
    if not find_shapes(bench.settings.shapes).adapted:
        return _step(bench, 2)
    finetuning = replace(bench.learning.finetuning, trainable="lora")
    row = _step(replace(bench, learning=replace(bench.learning, finetuning=finetuning)), 2)
    row.notes["trainable"] = f"adapters alone (lora, rank {finetuning.lora_rank})"
    return row


def stage2_8bit(bench: Bench) -> Measurement:
    """One step of fine-tuning all weights with 8-bit states, activations computed twice, without graphs."""
    finetuning = replace(bench.learning.finetuning, trainable="full", optimizer=adamw_8bit())
    performance = replace(bench.performance, gradient_checkpointing=True, cuda_graphs=False, autocast=True)
    learning = replace(bench.learning, finetuning=finetuning)
    return _step(replace(bench, dtype="float32", learning=learning, performance=performance), 2)


def diffusers_step(bench: Bench) -> Measurement:
    """One step as diffusers' DreamBooth scripts for LoRA take it, of `stage2_step`'s batch and precision.

    The denoiser's adapters learn alone, its own attention is in force, and the prompt is encoded once, by
    text encoders that stay in memory; there are no new words, masks, maps or graphs.
    """
    stage, device = bench.learning.finetuning, bench.device
    performance = available(bench.performance, device)
    memory = Memory(device)
    model = random_model(bench.settings.shapes, device, bench.dtype)
    model.add_lora(stage.lora_rank)
    model.set_trainable("lora")
    for encoder in model.text_encoders.values():
        encoder.requires_grad_(False)
    if performance.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    learning = [each for each in model.denoiser.train().parameters() if each.requires_grad]
    optimizer = make_optimizer("finetuning", stage, learning, fused=False)
    process, generator = model.process, torch.Generator().manual_seed(0)
    conditioning = model.encode_prompts(["a photo of a car"] * 2 * stage.batch_size)
    latents = torch.randn(2 * stage.batch_size, *model.latent_shape, device=device)
    precision = getattr(torch, performance.learning_precision)

    def step() -> None:
        noise, times = torch.randn_like(latents), process.draw_times(len(latents), generator).to(device)
        noisy = process.add_noise(latents, noise, times)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is not torch.float32):
            predicted, _ = model.predict(noisy, times, conditioning)
        errors = predicted.float() - process.target(latents, noise, times)
        own, prior = errors.square().chunk(2)
        (own.mean() + bench.learning.prior.weight * prior.mean()).backward()
        nn.utils.clip_grad_norm_(learning, stage.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    seconds = [stopwatch(device, step) for _ in range(bench.settings.warmup + bench.settings.steps)]
    return measured(seconds[bench.settings.warmup :], memory.peak_gib())


def maps(bench: Bench) -> Measurement:
    """What word maps and their losses cost of a step of each stage, measured with, without, and so again."""
    bench = replace(bench, settings=replace(bench.settings, operations=False))
    plain = replace(bench, penalty=PenaltySettings())
    notes: dict[str, Any] = {}
    for row in (stage1_step, stage2_step):
        own, without, again, last = (row(each).seconds for each in (bench, plain, bench, plain))
        assert own and without and again and last
        notes[f"{row.__name__} with maps"] = f"{own:.4f} s, {again:.4f} s"
        notes[f"{row.__name__} without maps"] = f"{without:.4f} s, {last:.4f} s"
        notes[f"{row.__name__}, share of maps"] = (own + again) / (without + last) - 1
    return Measurement(samples=bench.settings.steps, notes=notes)


SAVING = "saving"  # seconds, noted beside both stages
OPTIMIZERS = {
    "adamw": adamw(),
    "adamw_8bit": adamw_8bit(),
    "bitsandbytes_8bit": {"_target_": "bitsandbytes.optim.AdamW8bit"},
}


def optimizers(bench: Bench) -> Measurement:
    """A step of fine-tuning with several optimisers: time, peak memory, and how far the losses are apart."""
    notes: dict[str, float | str] = {}
    curves: dict[str, torch.Tensor] = {}
    for name, node in OPTIMIZERS.items():
        stage = replace(bench.learning.finetuning, optimizer=node)
        one = replace(bench, learning=replace(bench.learning, finetuning=stage))
        try:
            curves[name], told = _finetuned(one)
        except MifoError as error:  # a package that is not installed
            notes[name] = str(error)
            continue
        notes |= {f"{name}, {key}": value for key, value in told.items()}
    for name, curve in curves.items():
        apart = (curve - curves["adamw"]).abs() / curves["adamw"]
        notes[f"{name}, largest relative difference from adamw"] = apart.max().item()
    return Measurement(samples=bench.settings.steps, notes=notes)


def _finetuned(bench: Bench) -> tuple[torch.Tensor, dict[str, float]]:
    """The losses of some steps of fine-tuning, and a step's time, peak memory and mean loss.

    The callbacks end here: as long as they live, they keep the trainer with its weights in memory.
    """
    losses, times, memory = Losses(), StepTimes(bench.settings.warmup), Memory(bench.device)
    bench.learn((0, bench.settings.warmup + bench.settings.steps), [times, losses])
    curve = losses.values()
    return curve, {
        "seconds": median(times.seconds),
        "GiB": memory.peak_gib(),
        "mean loss": curve.mean().item(),
    }


def both_stages(bench: Bench) -> Measurement:
    """Both stages from first to last, with the encoding of pictures, without loading; saving is noted."""
    steps = bench.learning.semantic.steps, bench.learning.finetuning.steps
    memory, end = Memory(bench.device), LearningEnd()
    start, saved = bench.learn(steps, [end])
    row = measured([end.time - start], memory.peak_gib())
    row.notes = {"steps": f"{steps[0]} + {steps[1]}", SAVING: saved - end.time}
    return row


def processes(bench: Bench) -> Measurement:
    """Both stages, saving included, in a process of its own, where another one has compiled its kernels.

    The first is noted beside, and how long each process took with its imports, random weights and pictures.
    """
    own = ("performance", "device", "benchmark", "paths", "hydra")  # which `_command` and the row set
    typed = [text for text in bench.typed if re.split("[.=/@]", text.lstrip("+~"))[0] not in own]
    wanted = ("benchmark.rows=[both_stages]", f"benchmark.shapes={bench.settings.shapes}", *typed)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        for name in ("first", "second"):
            records = Path(folder) / name
            command = _command(bench, "benchmark", f"{folder}/run", f"benchmark.folder={records}", *wanted)
            start = perf_counter()
            _Process(command, Path(folder) / "log", caches).wait()
            whole = perf_counter() - start
            (record,) = (read_record(file, Record) for file in records.glob("*.json"))
            learned = record.rows["both_stages"]
            if learned.seconds is None:
                raise MifoError(f"both stages failed in a process: {learned.notes.get('failed')}")
            found.append((learned.seconds + float(learned.notes[SAVING]), whole))
    (first, first_whole), (second, second_whole) = found
    row = measured([second], Memory(bench.device).peak_gib())
    row.notes["first process, no kernel compiled before"] = first
    row.notes["from start to end"] = f"{first_whole:.1f} s, {second_whole:.1f} s"
    return row


def picture(bench: Bench) -> Measurement:
    """One picture, two boxes; 50 steps, or as many as a distilled model takes."""
    return bench.pictures(1, 2, bench.settings.repeats)


def three_pictures(bench: Bench) -> Measurement:
    """Three pictures at once, two boxes; steps as for one."""
    return bench.pictures(3, 2, bench.settings.repeats)


def network(bench: Bench) -> Measurement:
    """The bare network on two samples, without a loss or masks, in a row as a picture calls it."""
    performance = available(bench.performance, bench.device)
    model = random_model(bench.settings.shapes, bench.device, bench.dtype)
    ready_for_synthesis(model, performance)
    sampler = picture_sampler(model, SynthesisSettings(), GuidanceSettings(), performance.cuda_graphs)
    conditioning = model.encode_prompts(["", "a photo"]).to(model.dtype)
    latents = torch.randn(1, *model.latent_shape, device=model.device, dtype=model.dtype)

    @torch.no_grad()
    def forward(count: int) -> None:
        for _ in range(count):
            sampler.prediction(latents, sampler.time(0, model.device), conditioning, None, None)

    first, memory = stopwatch(bench.device, lambda: forward(1)), Memory(bench.device)
    # one by one the clocks of a GPU fall between calls: they differed by a quarter
    times = [stopwatch(bench.device, lambda: forward(10)) / 10 for _ in range(bench.settings.steps)]
    row = measured(times, memory.peak_gib())
    row.notes["first call, kernels compiled or loaded"] = first
    return row


def equivalence(bench: Bench) -> Measurement:
    """The profile's mean loss against float32 without graphs, beside what another seed changes."""
    plain = PerformanceSettings("plain", "highest", learning_precision="float32")
    steps = (bench.settings.steps, bench.settings.steps)

    def curve(performance: PerformanceSettings, seed: int) -> torch.Tensor:
        losses = Losses()
        bench.learn(steps, [losses], performance, seed=seed)
        return losses.values()

    exact = torch.stack([curve(plain, seed) for seed in range(3)])
    here = curve(bench.performance, 0)
    moved = (here.mean() - exact[0].mean()).abs().item()
    noise = exact.mean(1).std().item()
    notes: dict[str, Any] = {
        "mean_loss_float32": exact[0].mean().item(),
        "mean_loss": here.mean().item(),
        "difference": moved,
        "deviation_between_seeds": noise,
        "largest_relative_difference_of_a_step": ((here - exact[0]).abs() / exact[0]).max().item(),
        "within_noise": moved < noise,
    }
    return Measurement(samples=len(here), notes=notes)


def by_instances(bench: Bench) -> Measurement:
    """Seconds of a stage-1 step and of a picture with 1 to 8 instances."""
    notes: dict[str, Any] = {}
    for count in (1, 2, 4, 8):
        notes[f"step, {count} instances"] = _step(bench, 1, operations=False, instances=count).seconds
        notes[f"picture, {count} boxes"] = bench.pictures(1, count, 1, operations=False).seconds
    return Measurement(notes=notes)


def by_resolution(bench: Bench) -> Measurement:
    """Seconds of a stage-1 step and of a picture with two boxes, half to twice as wide as usual."""
    usual = find_shapes(bench.settings.shapes).side
    notes: dict[str, Any] = {}
    for side in (usual // 2, usual, usual * 2):
        notes[f"step, {side}²"] = _step(bench, 1, operations=False, side=side).seconds
        notes[f"picture, {side}²"] = bench.pictures(1, 2, 1, side, operations=False).seconds
    return Measurement(notes=notes)


def demo(bench: Bench) -> Measurement:
    """`make demo` without its scores, in a process of its own: start, class pictures, learning, synthesis."""
    return measured([_demos(bench, 1, "metrics=none")], Memory(bench.device).peak_gib())


def throughput(bench: Bench) -> Measurement:
    """Seconds a whole demo run takes when several run at once on this machine."""
    count = bench.settings.processes
    seconds = _demos(bench, count) / count
    row = measured([seconds], Memory(bench.device).peak_gib())
    row.notes = {"processes": count, "runs_per_hour": round(3600 / seconds)}
    return row


def _demos(bench: Bench, count: int, *overrides: str) -> float:
    """Seconds until `count` demo runs of different seeds, started at once, have ended."""
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        shared = ("experiment=demo", "logger=none", f"learning.prior.cache={folder}/prior", *overrides)
        running = [
            _Process(_command(bench, "run", f"{folder}/{i}", f"seed={i}", *shared), Path(folder) / f"{i}.log")
            for i in range(count)
        ]
        for process in running:
            process.wait()
        return perf_counter() - start


def _command(bench: Bench, task: str, folder: str, *overrides: str) -> list[str]:
    """A task of MIFO on this device with this profile, in a folder of its own."""
    profile = [text for text in bench.typed if text.lstrip("+").startswith("performance.")]
    usual = (f"device={bench.device.type}", f"performance={bench.performance.name}", *profile)
    return [sys.executable, "-m", "mifo", task, *usual, f"hydra.run.dir={folder}", *overrides]


class _Process:
    """A command in a process of its own."""

    def __init__(
        self, command: Sequence[str], told: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`told` takes what it prints; `environment` comes on top of this process's."""
        self._told = told
        with told.open("w") as log:
            env = {**os.environ, **(environment or {})}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def wait(self) -> None:
        """Raises MifoError with the last line that it printed, if it failed."""
        if self._process.wait():
            reason = (self._told.read_text().strip().splitlines() or ["nothing was said"])[-1]
            raise MifoError(f"a run failed in the benchmark: {reason}")


_ROWS: tuple[Callable[[Bench], Measurement], ...] = (
    matrix_product,
    stage1_step,
    stage2_step,
    stage2_8bit,
    diffusers_step,
    maps,
    optimizers,
    both_stages,
    picture,
    three_pictures,
    network,
    processes,
    equivalence,
    demo,
    throughput,
    by_instances,
    by_resolution,
)
ROWS = {row.__name__: row for row in _ROWS}


def tried(row: Callable[[Bench], Measurement], bench: Bench) -> Measurement:
    """The row, or why it failed in `notes`: out of memory is a result too, and the next row may fit."""
    try:
        return row(bench)
    except (MifoError, RuntimeError) as error:
        return Measurement(notes={"failed": first_line(error)})
