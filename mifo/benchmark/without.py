"""The plainer way in place of an idea of docs/performance.md, for as long as a row is measured.

Each function gives a context manager, within which everything computes what it always does, without the idea.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import lightning
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mifo.attention.masking
import mifo.attention.recording
import mifo.data.learning_data
import mifo.learning.stages
import mifo.performance.adamw_8bit
import mifo.performance.channels_last
import mifo.performance.graphs
from mifo.attention.layers import AttentionLayer
from mifo.attention.masking import MaskedAttention, _LastLayerRead
from mifo.attention.processors import project_context
from mifo.data.learning_data import LearningBatch, LearningData
from mifo.guidance.descent import loss_and_gradient
from mifo.learning.stages import LearningStage
from mifo.models.images import encode_images
from mifo.performance.graphs import GraphedStep, _laid_out
from mifo.performance.rounding import frozen_products
from mifo.synthesis.sampler import KeptPasses

Undoing = AbstractContextManager[Any]


def _drawing(also: Callable[[LearningData, LearningBatch], object]) -> Undoing:
    """A step's draw does this too."""
    usual = LearningData.draw

    def draw(self: LearningData, *where: int) -> LearningBatch:
        batch = usual(self, *where)
        also(self, batch)
        return batch

    return patch.object(LearningData, "draw", draw)


def latents_once() -> Undoing:
    """The pictures of a step pass through the autoencoder at each step."""

    def encode(data: LearningData, batch: LearningBatch) -> None:
        side, precision = data.model.image_size, data.performance.learning_precision
        rounded = torch.autocast(data.model.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with rounded:
            encode_images(data.model, torch.zeros(len(batch.latents), 3, side, side))

    return _drawing(encode)


def no_worker() -> Undoing:
    """Each step starts a worker of a DataLoader, as a data set of one picture does."""
    return _drawing(lambda data, batch: next(iter(DataLoader([0], num_workers=1))))


def draws_without_waiting() -> Undoing:
    """A step picks its mask by a list as an index, which waits for the device."""
    return _drawing(lambda data, batch: data.masks[[0]])


def losses_unread() -> Undoing:
    """The loss is read at each step."""
    usual = LearningStage.training_step

    def training_step(self: LearningStage, batch: LearningBatch, batch_index: int) -> Tensor:
        total = usual(self, batch, batch_index)
        self.last.total.item()
        return total

    return patch.object(LearningStage, "training_step", training_step)


def fused_attention() -> Undoing:
    """Probabilities of all layers lie in memory, those of the text encoder and the autoencoder too."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        scores = (scale or query.shape[-1] ** -0.5) * query @ key.transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).to(value.dtype) @ value

    undone = ExitStack()
    undone.enter_context(bits_for_masks())
    undone.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
    return undone


def words_columns() -> Undoing:
    """The mean over heads is taken of all rows and tokens, and the words' columns picked from it."""

    def columns(probabilities: Tensor, token_positions: Tensor | None) -> Tensor:
        every = probabilities.mean(1)
        if token_positions is None:
            return every
        rows, tokens = token_positions.shape
        index = token_positions[:, None, :].expand(-1, every.shape[1], tokens)
        return every[-rows:].gather(-1, index)

    return patch.object(mifo.attention.recording, "_columns", columns)


def _rounding(chosen: Callable[[nn.Module], bool]) -> Undoing:
    """Autocast rounds the frozen weights of these modules at each step."""
    return patch.object(
        mifo.learning.stages,
        "frozen_products",
        lambda module: {} if chosen(module) else frozen_products(module),
    )


def unet_rounded_once() -> Undoing:
    """Autocast rounds the U-Net's frozen weights at each step."""
    return _rounding(lambda module: isinstance(module, UNet2DConditionModel))


def text_encoder_rounded_once() -> Undoing:
    """Autocast rounds the text encoder's frozen weights at each step."""
    return _rounding(lambda module: not isinstance(module, UNet2DConditionModel))


def fused_adamw() -> Undoing:
    """AdamW takes PyTorch's usual way on the device, several kernels over lists of parameters."""
    usual = mifo.learning.stages._optimizer_class

    class AdamW(torch.optim.AdamW):
        pass

    return patch.object(
        mifo.learning.stages,
        "_optimizer_class",
        lambda name: AdamW if name == "adamw" else usual(name),
    )


def norm_handed_over() -> Undoing:
    """Gradients are scaled in a pass of their own."""

    def clip(
        self: LearningStage,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    return patch.object(LearningStage, "configure_gradient_clipping", clip)


def kernel_of_8_bit_states() -> Undoing:
    """8-bit AdamW is computed by PyTorch, parameter by parameter."""
    return patch.object(mifo.performance.adamw_8bit, "has_kernels", lambda device: False)


def backward_outside_autocast() -> Undoing:
    """The graph's backward pass is recorded under autocast."""

    def loss_and_gradients(self: GraphedStep, *inputs: Tensor) -> tuple[Tensor, Any, list[Tensor | None]]:
        with self._beside:
            loss, rest = self._function(*inputs)
            gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return loss.detach(), rest, _laid_out(gradients, self._parameters)

    return patch.object(GraphedStep, "_loss_and_gradients", loss_and_gradients)


def weight_gradients_beside() -> Undoing:
    """All gradients are computed in one stream."""
    return patch.object(mifo.performance.graphs, "WeightGradientsBeside", lambda device: nullcontext())


def gated_gelu_kernel() -> Undoing:
    """The feed-forwards keep diffusers' GEGLU."""
    return patch.object(mifo.performance.channels_last, "GEGLU", None)


def group_norm_kernels() -> Undoing:
    """Normalisations, residual blocks and transformers stay diffusers' own; weights lie channels-last."""
    return patch.object(mifo.performance.channels_last, "_is_affine", lambda module: False)


def stays_on_the_gpu() -> Undoing:
    """Lightning carries model and optimiser to the processor at the end of a stage."""
    both = ExitStack()
    for name in ("cpu", "on_train_end"):
        both.enter_context(patch.object(LearningStage, name, getattr(lightning.LightningModule, name)))
    return both


def pictures_read_once() -> Undoing:
    """A class picture is read for each of its latents, one after the other."""

    def turned(self: LearningData, pairs: list[tuple[int, int]]) -> Iterator[Tensor]:
        for number, mirror in pairs:
            (picture,) = self.pictures.read([number])
            there = picture.to(self.model.device)
            yield there.flip(-1) if mirror else there

    return patch.object(LearningData, "_turned", turned)


def pictures_encoded_together() -> Undoing:
    """Class pictures pass through the autoencoder one by one."""
    return patch.object(mifo.data.learning_data, "ENCODED_AT_ONCE", 1)


def conditional_half_alone() -> Undoing:
    """Guidance passes run both halves."""
    usual = MaskedAttention._guidance_sums

    def guidance_sums(self: MaskedAttention, latents: Tensor, timestep: Tensor) -> dict[int, Tensor]:
        prompt, text = self._prompt, self._text
        self._prompt = prompt._replace(text_states=torch.cat([prompt.text_states] * 2))
        self._text = {index: tuple(torch.cat([each] * 2) for each in heads) for index, heads in text.items()}
        try:
            sums = usual(self, torch.cat([latents, latents]), timestep)
        finally:
            self._prompt, self._text = prompt, text
        return {index: each[:, len(latents) :] for index, each in sums.items()}

    return patch.object(MaskedAttention, "_guidance_sums", guidance_sums)


def ended_after_the_last_layer() -> Undoing:
    """Guidance passes run the U-Net to its end."""
    usual = MaskedAttention.attend

    def attend(self: MaskedAttention, attn: nn.Module, layer: AttentionLayer, states: Tensor) -> Tensor:
        try:
            return usual(self, attn, layer, states)
        except _LastLayerRead:
            reading, self._reading = self._reading, frozenset()
            try:
                return usual(self, attn, layer, states)
            finally:
                self._reading = reading

    return patch.object(MaskedAttention, "attend", attend)


def keys_and_values_once() -> Undoing:
    """The prompt's keys and values are computed at each pass."""

    def text_heads(self: MaskedAttention, attn: nn.Module, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        states = self._prompt.text_states
        return project_context(attn, states.chunk(2)[1] if self._guiding else states)

    return patch.object(MaskedAttention, "_text_heads", torch.no_grad()(text_heads))


def masks_once() -> Undoing:
    """Masks are made at each pass."""
    usual = MaskedAttention._mask

    def mask(self: MaskedAttention, name: Any) -> Tensor:
        self._masks.pop(name, None)
        return usual(self, name)

    return patch.object(MaskedAttention, "_mask", mask)


def bits_for_masks() -> Undoing:
    """Masked attention of synthesis reads a mask of all pairs of pixels, or of pixels and tokens."""
    return patch.object(mifo.attention.masking, "runs_as_kernels", lambda *_: False)


def guidance_as_one_graph() -> Undoing:
    """A graph of the guidance pass and one of its gradients, the loss between them without."""

    def guidance_gradient(
        self: MaskedAttention, latents: Tensor, timestep: Tensor, alphas: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_two_graphs"):
            sample = latents.detach().clone().requires_grad_()

            def sums(z: Tensor, time: Tensor) -> tuple[Tensor, ...]:
                with torch.enable_grad():
                    cross, own = self.guidance_pass(z, time)
                self._kinds = len(cross)
                return (*cross, *own)

            self._two_graphs = torch.cuda.make_graphed_callables(sums, (sample, timestep.clone()))

        def read(z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            every = self._two_graphs(z, timestep)
            return every[: self._kinds], every[self._kinds :]

        return loss_and_gradient(latents, read, alphas, self._settings)

    return patch.object(MaskedAttention, "guidance_gradient", guidance_gradient)


def graphs_kept() -> Undoing:
    """Each picture captures graphs of its own."""
    return patch.object(KeptPasses, "of_form", lambda self, form, make: make())
