"""What a learning step draws. All that is constant is computed once; a step only draws and picks.

B instance samples, P class samples (P = B with a prior, else 0), N instances, L tokens, h × w latents,
H × W pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, groupby
from operator import itemgetter
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.images import encode_images
from mifo.backbones.loading import DiffusionModel
from mifo.backbones.text import tokenize
from mifo.data.instances import InstanceSet
from mifo.errors import MifoError
from mifo.making.class_pictures import class_picture_files, class_pictures, class_prompts
from mifo.training.settings import LearningSettings, StageSettings

ENCODED_AT_ONCE = 16  # class pictures and mirror images


@dataclass
class LearningBatch:
    """One step's draw; class samples come first. All shapes are the same at every step.

    Attributes:
        input_ids: (P + B, L) tokens of the prompts.
        latents: (P + B, 4, h, w), drawn from the VAE's posterior.
        noise: (P + B, 4, h, w) standard normal.
        timesteps: (P + B,) uniform integers in [0, T).
        token_positions: (B, N) place of each selected instance's token in its prompt; 0 beyond them.
        masks: (B, N, H, W) in [0, 1], of the selected instances in the prompt's order; 0 beyond them.
        valid: (B, N) 1 for a selected instance, else 0.
    """

    input_ids: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    token_positions: Tensor
    masks: Tensor
    valid: Tensor


class _Choices(NamedTuple):
    """What a step takes, of the numbers that it draws.

    Attributes:
        selections: B times the numbers of the instances in the prompt's order.
        flips: (B,) 1 for the mirror image, else 0.
        pictures: (P,) a class picture's number and 1 for its mirror image, else 0.
    """

    selections: list[tuple[int, ...]]
    flips: list[int]
    pictures: list[tuple[int, int]]


class LearningData(lightning.LightningDataModule):
    """Draws of one stage, without end. A step's draw depends on its number alone, so a resumed run repeats.

    The model must carry the instances' tokens and lie on the device where it learns.

    Args:
        prior: whether class samples are drawn too.
        stream: tells the random draws of the stages apart.
        performance: how class pictures are made and encoded; None: in float32, without CUDA graphs.
    """

    def __init__(
        self,
        model: DiffusionModel,
        instances: InstanceSet,
        settings: LearningSettings,
        stage: StageSettings,
        seed: int,
        stream: int = 0,
        prior: bool = False,
        performance: PerformanceSettings | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.instances = instances
        self.settings = settings
        self.steps, self.batch_size = stage.steps, stage.batch_size
        self.seed = seed
        self.stream = stream
        self.performance = performance
        self.prompts = class_prompts(instances, settings.prior) if prior else []
        self._class_pictures = (model, self.prompts, settings.prior, seed, performance)
        self._prompt = cache(self._tokenized)

    def prepare_data(self) -> None:
        """Make the class pictures that are missing, in one process only."""
        if self.prompts:
            class_picture_files(*self._class_pictures)

    def setup(self, stage: str) -> None:
        """Encode the image, its mirror image and what the steps draw of the class pictures, each once."""
        image, masks = self.instances.resized(self.model.image_size)
        self.latents = encode_images(self.model, [image, image.flip(-1)])
        self.masks = torch.stack([masks, masks.flip(-1)]).to(self.model.device)
        # row N stands for no instance
        self.masks = torch.cat([self.masks, torch.zeros_like(self.masks[:, :1])], 1)
        if self.prompts:
            self.pictures, told = class_pictures(*self._class_pictures)
            self.class_ids = tokenize(self.model.tokenizer, told)
            self.class_latents: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
            rank, accumulated = 0, 1
            if self.trainer is not None:
                rank, accumulated = self.trainer.global_rank, self.trainer.accumulate_grad_batches
            # one more, as the trainer draws a batch ahead
            steps = range(self.steps * accumulated + 1)
            self._encode(pair for i in steps for pair in self._choices(self._generator(i, rank)).pictures)

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's step on; without workers, since nothing is read or decoded."""
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(_Draws(self, first), batch_size=None)

    def draw(self, step: int, rank: int = 0) -> LearningBatch:
        """The batch of a step, after `setup`; union sampling: Break-a-Scene (arXiv 2305.16311)."""
        generator = self._generator(step, rank)
        selections, flips, pictures = self._choices(generator)
        prompts = [self._prompt(chosen) for chosen in selections]
        number = len(self.instances.tokens)
        padded = [list(chosen) + [number] * (number - len(chosen)) for chosen in selections]
        input_ids = torch.stack([ids for ids, _ in prompts])
        means, deviations = ([each[flip] for flip in flips] for each in self.latents)
        if self.prompts:
            self._encode(pictures)
            input_ids = torch.cat([self.class_ids[[i for i, _ in pictures]], input_ids])
            encoded = zip(*(self.class_latents[pair] for pair in pictures), strict=True)
            means, deviations = (
                [*each, *rest] for each, rest in zip(encoded, (means, deviations), strict=True)
            )
        mean, deviation = torch.stack(means), torch.stack(deviations)
        # drawn on the CPU, so that a seed gives the same run on every device
        draws = torch.randn(2, *mean.shape, generator=generator, pin_memory=mean.is_cuda)
        sample, noise = draws.to(mean.device, non_blocking=True)
        timesteps = self._integers(
            self.model.noise_scheduler.config.num_train_timesteps, len(mean), generator
        )
        return LearningBatch(
            input_ids=input_ids,
            latents=mean + deviation * sample,
            noise=noise,
            timesteps=torch.tensor(timesteps),
            token_positions=torch.stack([positions for _, positions in prompts]),
            # picked one by one: a list as an index would travel to the GPU and wait for it
            masks=torch.stack(
                [
                    torch.stack([self.masks[flip, row] for row in rows])
                    for flip, rows in zip(flips, padded, strict=True)
                ]
            ),
            valid=torch.tensor([[float(i < len(chosen)) for i in range(number)] for chosen in selections]),
        )

    def _generator(self, step: int, rank: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, self.stream, rank, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(entropy[0]))

    def _choices(self, generator: torch.Generator) -> _Choices:
        """What a step takes: the first draws of its generator."""
        selections = [self._selection(generator) for _ in range(self.batch_size)]
        flips = [self._flip(generator) for _ in selections]
        pictures = self._integers(len(self.class_ids), self.batch_size, generator) if self.prompts else []
        return _Choices(selections, flips, [(i, self._flip(generator)) for i in pictures])

    def _encode(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Encode class pictures or their mirror images, as in `_Choices`, where they are not yet."""
        missing = sorted({*pairs} - self.class_latents.keys())
        if not missing:
            return
        rounded = self.performance is not None and self.performance.learning_precision == "bfloat16"
        # who computes activations twice for want of memory has none for 16 pictures, which take 6 GiB
        spare = self.performance is not None and self.performance.gradient_checkpointing
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=rounded):
            encoded = encode_images(self.model, self._turned(missing), 1 if spare else ENCODED_AT_ONCE)
        means, deviations = (each.float() for each in encoded)
        self.class_latents.update(zip(missing, zip(means, deviations, strict=True), strict=True))

    def _turned(self, pairs: list[tuple[int, int]]) -> Iterator[Tensor]:
        """The class pictures or mirror images of sorted pairs, each picture read once."""
        numbers = list(dict.fromkeys(i for i, _ in pairs))
        turns = (turns for _, turns in groupby(pairs, itemgetter(0)))
        device = self.model.device  # found by a walk through the U-Net
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
        """Tokens (L,) of the prompt of these instances, and the places (N,) of their tokens, 0 as padding."""
        tokens = [self.instances.tokens[i] for i in chosen]
        ids = tokenize(self.model.tokenizer, [self.settings.template.format(" and ".join(tokens))])[0]
        positions = torch.zeros(len(self.instances.tokens), dtype=torch.long)
        for place, token in enumerate(tokens):
            found = (ids == self.model.tokenizer.convert_tokens_to_ids(token)).nonzero()
            if len(found) != 1:
                raise MifoError(
                    f"learning.template={self.settings.template!r} must name each instance once, "
                    f"but {token} stands {len(found)} times in its prompt; use {{}} once: 'a photo of {{}}'."
                )
            positions[place] = found[0, 0]
        return ids, positions


class _Draws(IterableDataset):
    """Endless draws from step `first` on."""

    def __init__(self, data: LearningData, first: int) -> None:
        self.data = data
        self.first = first

    def __iter__(self) -> Iterator[LearningBatch]:
        rank = self.data.trainer.global_rank
        return (self.data.draw(step, rank) for step in count(self.first))
