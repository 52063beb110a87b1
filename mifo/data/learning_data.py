"""The random draws of a learning step. Latents and masks are computed once; a step draws and picks.

B instance samples, P class samples (P = B with a prior, else 0), N instances, H × W pixels.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from itertools import count, groupby
from operator import itemgetter
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.model import DiffusionModel
from mifo.data.class_pictures import ClassPictures
from mifo.data.instances import InstanceSet
from mifo.data.mask_pyramid import MaskPyramid
from mifo.data.settings import DrawSettings
from mifo.errors import MifoError
from mifo.method.objective import StepInputs

_Turned = tuple[int, int]  # the number of a class picture, and 1 for its mirror image, else 0


def encoded_at_once(image_size: int, performance: PerformanceSettings | None) -> int:
    """How many class pictures and mirror images are encoded together.

    16 of 512² pixels need 6 GiB. Of larger ones as many pixels are taken, and a single picture where
    activations are computed twice to save memory.
    """
    if performance is not None and performance.gradient_checkpointing:
        return 1
    return min(16, max(1, 16 * 512**2 // image_size**2))


class LearningBatch(NamedTuple):
    """One step's draw; class samples come first. All shapes are the same at every step."""

    ids: Tensor  # tokens of the prompts, (P + B, …), as the model's `tokenize` gives them
    inputs: StepInputs  # K = N, and rows beyond the selected instances are not valid


class LearningData(lightning.LightningDataModule):
    """Draws of one stage, without end. A step's draw depends on its number alone, so a resumed run repeats.

    The model must know the instances' words and lie on the device where it learns.

    Args:
        sizes: of the attention maps that are compared with masks.
        stream: tells the random draws of the stages apart.
        class_pictures: gives the class pictures and the prompt of each, made at its first call; None: no
            class samples.
        performance: how class pictures are encoded; None: in float32.
    """

    def __init__(
        self,
        model: DiffusionModel,
        instances: InstanceSet,
        settings: DrawSettings,
        steps: int,
        batch_size: int,
        sizes: Collection[tuple[int, int]],
        seed: int,
        stream: int = 0,
        class_pictures: Callable[[], tuple[ClassPictures, list[str]]] | None = None,
        performance: PerformanceSettings | None = None,
    ) -> None:
        super().__init__()
        self.model, self.instances, self.settings = model, instances, settings
        self.steps, self.batch_size, self.sizes = steps, batch_size, sizes
        self.seed, self.stream, self.performance = seed, stream, performance
        self._class_pictures = class_pictures
        self._prompt = cache(self._tokenized)

    def setup(self, stage: str) -> None:
        """Encode, once, the image, its mirror image and the class pictures that the steps will draw."""
        image, masks = self.instances.resized(self.model.image_size)
        self.latents = self.model.encode_images([image, image.flip(-1)])
        self.masks = MaskPyramid.of(masks.to(self.model.device), self.sizes, self.model.latent_shape[1:])
        self.masks.check()
        # ids of the prompt of all instances, as long as any prompt of the run
        self._longest = self._prompt(tuple(range(len(self.instances.tokens))))[0]
        if self._class_pictures:
            self.pictures, told = self._class_pictures()
            self.class_ids = self.model.tokenize(told)
            self._longest = max(self._longest, self.class_ids[0], key=lambda ids: ids.shape[-1])
            self.class_latents: dict[_Turned, tuple[Tensor, Tensor]] = {}
            steps = range(self.steps + 1)  # one more, as the trainer draws a batch ahead
            self._encode(pair for i in steps for pair in self._choices(self._generator(i))[2])

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's step on; without workers, since nothing is read or decoded."""
        return DataLoader(_Draws(self, self.trainer.global_step), batch_size=None)

    def draw(self, step: int) -> LearningBatch:
        """The batch of a step, after `setup`; union sampling: Break-a-Scene (arXiv 2305.16311)."""
        generator = self._generator(step)
        selections, flips, pictures = self._choices(generator)
        prompts = [self._prompt(chosen) for chosen in selections]
        number = len(self.instances.tokens)
        padded = [list(chosen) + [number] * (number - len(chosen)) for chosen in selections]
        ids = [each for each, _ in prompts]
        means, deviations = ([each[flip] for flip in flips] for each in self.latents)
        if self._class_pictures:
            self._encode(pictures)
            ids = [*(self.class_ids[i] for i, _ in pictures), *ids]
            encoded = zip(*(self.class_latents[pair] for pair in pictures), strict=True)
            means, deviations = (
                [*each, *rest] for each, rest in zip(encoded, (means, deviations), strict=True)
            )
        mean, deviation = torch.stack(means), torch.stack(deviations)
        # drawn on the CPU, so that a seed gives the same run on every device
        draws = torch.randn(2, *mean.shape, generator=generator, pin_memory=mean.is_cuda)
        sample, noise = draws.to(mean.device, non_blocking=True)
        times = self.model.process.draw_times(len(mean), generator)
        masks = [self.masks.rows(flip, rows) for flip, rows in zip(flips, padded, strict=True)]
        return LearningBatch(
            # as long at every step, which a CUDA graph needs; a longer prompt would not be cut
            pad_sequence([each.mT for each in (*ids, self._longest)], True, -1)[:-1].mT,
            StepInputs(
                latents=mean + deviation * sample,
                noise=noise,
                times=times,
                word_positions=torch.stack([positions for _, positions in prompts]),
                masks={size: torch.stack([levels[size] for levels, _ in masks]) for size in self.sizes},
                latent_masks=torch.stack([latent for _, latent in masks]),
                valid=torch.tensor(
                    [[float(i < len(chosen)) for i in range(number)] for chosen in selections]
                ),
            ),
        )

    def _generator(self, step: int) -> torch.Generator:
        # the 0 was the number of a process; it stays, so that the draws do
        entropy = np.random.SeedSequence([self.seed, self.stream, 0, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(entropy[0]))

    def _choices(self, generator: torch.Generator) -> tuple[list[tuple[int, ...]], list[int], list[_Turned]]:
        """The first draws of a step.

        Returns:
            B times the numbers of the instances in the prompt's order; B times 1 for the mirror image or 0;
            and the P class pictures.
        """
        selections = [self._selection(generator) for _ in range(self.batch_size)]
        flips = [self._flip(generator) for _ in selections]
        pictures = (
            self._integers(len(self.class_ids), self.batch_size, generator) if self._class_pictures else []
        )
        return selections, flips, [(i, self._flip(generator)) for i in pictures]

    def _encode(self, pairs: Iterable[_Turned]) -> None:
        """Encode the class pictures and mirror images that are not encoded yet."""
        missing = sorted({*pairs} - self.class_latents.keys())
        if not missing:
            return
        rounded = self.performance is not None and self.performance.learning_precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=rounded):
            encoded = self.model.encode_images(
                self._turned(missing), encoded_at_once(self.model.image_size, self.performance)
            )
        means, deviations = (each.float() for each in encoded)
        self.class_latents.update(zip(missing, zip(means, deviations, strict=True), strict=True))

    def _turned(self, pairs: list[_Turned]) -> Iterator[Tensor]:
        """The class pictures or mirror images of sorted pairs, each picture read once."""
        numbers = list(dict.fromkeys(i for i, _ in pairs))
        turns = (turns for _, turns in groupby(pairs, itemgetter(0)))
        device = self.model.device  # found by a walk through the network
        for picture, turn in zip(self.pictures.read(numbers), turns, strict=True):
            there = picture.to(device)
            yield from (there.flip(-1) if mirror else there for _, mirror in turn)

    def _selection(self, generator: torch.Generator) -> tuple[int, ...]:
        """k ~ U{1…N} distinct instances in random order."""
        number = len(self.instances.tokens)
        if not self.settings.union_sampling:
            return tuple(range(number))
        size = self._integers(number, 1, generator)[0] + 1
        return tuple(torch.randperm(number, generator=generator)[:size].tolist())

    def _flip(self, generator: torch.Generator) -> int:
        return int(torch.rand((), generator=generator) < self.settings.flip_probability)

    @staticmethod
    def _integers(limit: int, size: int, generator: torch.Generator) -> list[int]:
        return torch.randint(limit, (size,), generator=generator).tolist()

    def _tokenized(self, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Ids of the prompt of these instances, and the places (N,) of their words, 0 as padding."""
        tokens = [self.instances.tokens[i] for i in chosen]
        ids = self.model.tokenize([self.settings.template.format(" and ".join(tokens))])[0]
        positions = torch.zeros(len(self.instances.tokens), dtype=torch.long)
        for place, token in enumerate(tokens):
            found = self.model.places(ids, token)
            if len(found) != 1:
                raise MifoError(
                    f"learning.template={self.settings.template!r} must name each instance once, "
                    f"but {token} stands {len(found)} times in its prompt; use {{}} once: 'a photo of {{}}'."
                )
            positions[place] = found[0]
        return ids, positions


class _Draws(IterableDataset):
    """Endless draws from step `first` on."""

    def __init__(self, data: LearningData, first: int) -> None:
        self.data = data
        self.first = first

    def __iter__(self) -> Iterator[LearningBatch]:
        return map(self.data.draw, count(self.first))
