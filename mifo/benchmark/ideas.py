"""What each idea of docs/performance.md gains: a row measured with all of them, then without one."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from rich.progress import track

import mifo.learning.learn
from mifo.benchmark import without
from mifo.benchmark.measuring import Measurement, Memory, measured, stopwatch
from mifo.benchmark.records import AGAIN, BASELINE, WITHOUT
from mifo.benchmark.rows import Bench, by_name, noise_pictures, picture, stage1_step, stage2_step, tried
from mifo.benchmark.shapes import random_instances, random_model
from mifo.data.learning_data import LearningData
from mifo.data.prior import class_picture_files
from mifo.errors import MifoError
from mifo.models.tokens import add_instance_tokens
from mifo.performance.profile import available, ready_for_learning


@dataclass(frozen=True)
class Idea:
    """One idea.

    Attributes:
        name: as in docs/performance.md.
        rows: what it is measured by, names of `MEASURES`.
        undo: the plainer way in its place.
        otherwise: the same bench, or one whose settings switch it off.
        graphs: whether it needs CUDA graphs (True) or can not be undone within them (False).
        where: keys of the profile and the values with which the idea has an effect.
    """

    name: str
    rows: tuple[str, ...]
    undo: Callable[[], AbstractContextManager[Any]] = nullcontext
    otherwise: Callable[[Bench], Bench] = replace
    graphs: bool | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


def _profile(**keys: Any) -> Callable[[Bench], Bench]:
    """With these keys of the profile."""
    return lambda bench: replace(bench, performance=replace(bench.performance, **keys))


def _learning(part: str, **keys: Any) -> Callable[[Bench], Bench]:
    """With these settings of a part of learning."""

    def changed(bench: Bench) -> Bench:
        own = replace(getattr(bench.learning, part), **keys)
        return replace(bench, learning=replace(bench.learning, **{part: own}))

    return changed


def stage2_with_adamw(bench: Bench) -> Measurement:
    """A step of fine-tuning with PyTorch's AdamW, states of 32 bits."""
    return stage2_step(_learning("finetuning", optimizer="adamw")(bench))


def stage1_under_autocast(bench: Bench) -> Measurement:
    """A step of semantic learning whose precision autocast chooses."""
    return stage1_step(_profile(autocast=True)(bench))


def stage2_under_autocast(bench: Bench) -> Measurement:
    """A step of fine-tuning whose precision autocast chooses."""
    return stage2_step(_profile(autocast=True)(bench))


def around_the_steps(bench: Bench) -> Measurement:
    """A few steps of both stages, from the model in memory to the model that has learned; without saving."""
    memory, seconds = Memory(bench.device), []
    with patch.object(mifo.learning.learn, "save_learned", lambda *_, **__: None):
        for _ in range(2):
            start = bench.learn((2, 2), [])
            seconds.append(perf_counter() - start)
    return measured(seconds, memory.peak_gib())


def class_pictures_encoded(bench: Bench) -> Measurement:
    """The latents of all class pictures and their mirror images, from files."""
    performance = available(bench.performance, bench.device)
    model = random_model(bench.settings.shapes, bench.device, bench.dtype)
    instances = random_instances(bench.settings.instances, model.image_size)
    add_instance_tokens(model, instances.tokens)
    ready_for_learning(model, performance)
    with tempfile.TemporaryDirectory() as folder:
        noise_pictures(Path(folder) / "prior", bench.learning.prior.pictures, model.image_size)
        learning = _learning("prior", folder=f"{folder}/prior")(bench).learning
        # so many draws take all of them
        stage = replace(learning.finetuning, steps=16 * learning.prior.pictures)
        data = LearningData(model, instances, learning, stage, 0, prior=True, performance=performance)
        data.setup("fit")
        memory = Memory(bench.device)
        seconds = [stopwatch(bench.device, lambda: data.setup("fit")) for _ in range(bench.settings.repeats)]
        return measured(seconds, memory.peak_gib())


def class_pictures_made(bench: Bench) -> Measurement:
    """Sixteen class pictures, their capture included."""
    performance = available(bench.performance, bench.device)
    model = random_model(bench.settings.shapes, bench.device, bench.dtype)
    ready_for_learning(model, performance)
    memory, seconds = Memory(bench.device), []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            prior = _learning("prior", pictures=16, cache=folder, folder=None)(bench).learning.prior
            make = (model, ["a photo of a car"], prior, 0, performance)
            seconds.append(stopwatch(bench.device, lambda make=make: class_picture_files(*make)))
    return measured(seconds[1:], memory.peak_gib())


MEASURES = by_name(
    stage1_step,
    stage2_step,
    stage2_with_adamw,
    stage1_under_autocast,
    stage2_under_autocast,
    picture,
    class_pictures_encoded,
    class_pictures_made,
    around_the_steps,
)
STEPS = ("stage1_step", "stage2_step")
BFLOAT16 = {"learning_precision": "bfloat16"}
_in_float32 = _profile(learning_precision="float32", autocast=True)

IDEAS = (
    Idea("latents encoded once", STEPS, without.latents_once),
    Idea("no data worker", STEPS, without.no_worker),
    Idea("draws that do not wait", STEPS, without.draws_without_waiting),
    Idea("losses unread", STEPS, without.losses_unread),
    Idea("fused attention", (*STEPS, "picture"), without.fused_attention),
    Idea("the words' columns alone", STEPS, without.words_columns),
    Idea("bfloat16 in learning", STEPS, otherwise=_in_float32, where=BFLOAT16),
    Idea("U-Net rounded once", ("stage1_under_autocast",), without.unet_rounded_once),
    Idea("text encoder rounded once", ("stage1_under_autocast",), without.text_encoder_rounded_once),
    Idea(
        "backward outside autocast",
        ("stage1_under_autocast", "stage2_under_autocast"),
        without.backward_outside_autocast,
        graphs=True,
    ),
    Idea("fused AdamW", ("stage2_with_adamw",), without.fused_adamw),
    Idea("norm handed over", ("stage2_with_adamw", "stage2_step"), without.norm_handed_over),
    Idea("one kernel of 8-bit states", ("stage2_step",), without.kernel_of_8_bit_states),
    Idea("no autocast", STEPS, otherwise=_profile(autocast=True), where={"autocast": False}),
    Idea("graph of the step", STEPS, otherwise=_profile(cuda_graphs=False), graphs=True),
    Idea("gradients of weights beside", STEPS, without.weight_gradients_beside, graphs=True),
    Idea(
        "channels-last, with its kernels",
        (*STEPS, "picture"),
        otherwise=_profile(channels_last=False),
        where={"channels_last": True},
    ),
    Idea(
        "GroupNorm's kernels", (*STEPS, "picture"), without.group_norm_kernels, where={"channels_last": True}
    ),
    Idea("GEGLU's kernels", (*STEPS, "picture"), without.gated_gelu_kernel, where={"channels_last": True}),
    Idea(
        "bfloat16 in synthesis",
        ("picture",),
        otherwise=_profile(synthesis_precision="float32"),
        where={"synthesis_precision": "bfloat16"},
    ),
    Idea("guidance on the conditional half", ("picture",), without.conditional_half_alone),
    Idea("guidance ended early", ("picture",), without.ended_after_the_last_layer),
    Idea("keys and values once", ("picture",), without.keys_and_values_once),
    Idea("masks once", ("picture",), without.masks_once, graphs=False),
    Idea("bits for masks", ("picture",), without.bits_for_masks),
    Idea("graphs of synthesis", ("picture",), otherwise=_profile(cuda_graphs=False), graphs=True),
    Idea("guidance as one graph", ("picture",), without.guidance_as_one_graph, graphs=True),
    Idea("graphs kept", ("picture",), without.graphs_kept, graphs=True),
    Idea("class pictures read once, in threads", ("class_pictures_encoded",), without.pictures_read_once),
    Idea("class pictures encoded together", ("class_pictures_encoded",), without.pictures_encoded_together),
    Idea("bfloat16 in encoding", ("class_pictures_encoded",), otherwise=_in_float32, where=BFLOAT16),
    Idea("bfloat16 in class pictures", ("class_pictures_made",), otherwise=_in_float32, where=BFLOAT16),
    Idea(
        "class pictures made together",
        ("class_pictures_made",),
        otherwise=_learning("prior", batch_size=1),
    ),
    Idea(
        "graphs of class pictures",
        ("class_pictures_made",),
        otherwise=_profile(cuda_graphs=False),
        graphs=True,
    ),
    Idea("stays on the GPU", ("around_the_steps",), without.stays_on_the_gpu),
)


def ideas(bench: Bench) -> Iterator[tuple[str, Measurement]]:
    """Each row with all ideas, then without one idea after the other, and with all of them again.

    Yields:
        A name, "ROW with all ideas" or "ROW without IDEA", and what was measured.

    Raises:
        MifoError: `benchmark.ideas` names an idea that there is not.
    """
    names = [idea.name for idea in IDEAS]
    if unknown := [name for name in bench.settings.ideas if name not in names]:
        raise MifoError(
            f"benchmark.ideas names {unknown[0]!r}, which is none; take some of {', '.join(names)}."
        )
    bench = replace(bench, settings=replace(bench.settings, operations=False))
    performance = available(bench.performance, bench.device)
    wanted = [
        idea
        for idea in IDEAS
        if idea.name in (bench.settings.ideas or names)
        and idea.graphs in (None, performance.cuda_graphs)
        and all(getattr(performance, key) == value for key, value in idea.where.items())
    ]
    for row, measure in MEASURES.items():
        chosen = [idea for idea in wanted if row in idea.rows]
        if not chosen:
            continue
        yield f"{row} {BASELINE}", tried(measure, bench)
        for idea in track(chosen, row):
            with idea.undo():
                yield row + WITHOUT + idea.name, tried(measure, idea.otherwise(bench))
        yield f"{row} {BASELINE}{AGAIN}", tried(measure, bench)
