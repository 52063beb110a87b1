"""Attention bounded by boxes or shapes in every layer of a U-Net, and what is read from it during synthesis.

Bounded Attention (arXiv 2403.16990) as MIFO (arXiv 2511.00542) uses it. There are two
kinds of
pass: a *guidance* pass runs the conditional half alone, up to the last layer that the loss reads; a
    *denoising* pass
runs both halves, the unconditional first, and can add its maps to the running means from which shapes are
renewed.

Letters: B samples, S subjects, L tokens of the prompt, n = R² pixels of a layer.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mifo.attention.layers import AttentionLayer, attention_layers
from mifo.attention.processors import (
    attention_probabilities,
    installed_processors,
    merge_heads,
    project_heads,
)
from mifo.guidance.loss import attention_sums


def cross_attention_mask(
    shapes: Tensor, subject_tokens: Tensor, filter_tokens: Tensor, eos_index: int, guidance: bool
) -> Tensor:
    """Which tokens each pixel may attend to.

    A subject's tokens are closed outside its own pixels, filter tokens (function words) everywhere, and the
    first end-of-text token on the background. In guidance passes the background may attend to every subject
    and to the end-of-text token.

    Args:
        shapes: bool (B, S, n), the pixels of each subject; the background is what no subject has.
        subject_tokens: bool (S, L). filter_tokens: bool (L,).

    Returns:
        Bool (B, n, L), True where open.
    """
    background = ~shapes.any(dim=1)[..., None]  # (B, n, 1)
    outside = ~shapes.mT  # (B, n, S)
    if guidance:
        outside = outside & ~background
    closed = (outside[..., None] & subject_tokens).any(dim=2) | filter_tokens
    if not guidance:
        closed[..., eos_index] |= background[..., 0]
    return ~closed


def self_attention_mask(shapes: Tensor) -> Tensor:
    """Which pixels see each other: those with a subject in common, and any with the background.

    Pixels where shapes overlap belong to all of their subjects.

    Args:
        shapes: bool (B, S, n).

    Returns:
        Bool (B, n, n), symmetric, True where open.
    """
    pixels = shapes.bfloat16()  # S products of 0 and 1, summed in 32 bits: exact enough for > 0
    background = ~shapes.any(dim=1)
    return (pixels.mT @ pixels > 0) | background[:, None] | background[..., None]


class MaskedAttention:
    """Runs a U-Net, within a `with` block, with attention bounded by the pixels of each subject.

    Layers whose probabilities are read compute them in the open and in 32 bits, all others use fused
    attention. Masks are made once for each set of shapes, kind of pass and resolution. The processors found
    before are put back on leaving, also after an exception. The U-Net's parameters should not require
    gradients.

    Attributes:
        self_map: (B, n, n) mean over the recorded denoising passes, the shape layers and heads; conditional
            half.
        cross_map: (B, n, S) likewise, at the leading token (the last index) of each subject.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_states: Tensor,
        subject_tokens: Sequence[Sequence[int]],
        filter_indices: Sequence[int],
        eos_index: int,
        guidance_layers: Sequence[int],
        shape_layers: Sequence[int],
        masked: bool = True,
    ) -> None:
        """Take the prompt and the layers to read.

        Args:
            text_states: (2B, L, width), unconditional rows first.
            subject_tokens: positions of each subject's tokens in the prompt, the leading one last.
            guidance_layers, shape_layers: `AttentionLayer.index`; the shape layers are of one resolution.
            masked: bound attention; else it is only read.
        """
        device, tokens = text_states.device, text_states.shape[1]
        self.unet = unet
        self.text_states = text_states
        self.masked = masked
        self._layers = {layer.index: layer for layer in attention_layers(unet)}
        self._guidance_layers = frozenset(guidance_layers)
        self._shape_layers = frozenset(shape_layers)
        self._subject_tokens = torch.zeros(len(subject_tokens), tokens, dtype=torch.bool)
        for row, positions in zip(self._subject_tokens, subject_tokens, strict=True):
            row[list(positions)] = True
        self._subject_tokens = self._subject_tokens.to(device)
        self._filter_tokens = torch.zeros(tokens, dtype=torch.bool)
        self._filter_tokens[list(filter_indices)] = True
        self._filter_tokens = self._filter_tokens.to(device)
        self._leading = torch.tensor([positions[-1] for positions in subject_tokens], device=device)
        self._eos_index = eos_index
        self._reading: frozenset[int] = frozenset()
        self._guiding = False
        self._sums: dict[int, Tensor] = {}
        self._totals: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
        self._recorded = {"self": 0, "cross": 0}
        self._installed: AbstractContextManager[None] | None = None

    def bound(self, shapes_at: Callable[[int], Tensor]) -> None:
        """Bound attention by shapes from now on.

        Args:
            shapes_at: gives for the side R of a map bool shapes (B or 1, S, R, R) on the U-Net's device.
        """
        self._shapes_at = shapes_at
        self._shapes: dict[int, Tensor] = {}
        self._biases: dict[tuple[bool, str, int, torch.dtype], Tensor] = {}

    def guidance_pass(self, latents: Tensor, timestep: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The sums F, B of `attention_sums` for each cross layer and each self layer that the loss reads.

        Args:
            latents: (B, 4, H, W). timestep: a scalar.

        Returns:
            One (2, B, S) for each layer, differentiable with respect to the latents.
        """
        self._guiding, self._reading, self._sums = True, self._guidance_layers, {}
        conditional = self.text_states.chunk(2)[1]
        with suppress(_LastLayerRead):
            self.unet(latents.to(conditional.dtype), timestep, encoder_hidden_states=conditional)
        sums = {
            kind: [self._sums[index] for index in sorted(self._sums) if self._layers[index].kind == kind]
            for kind in ("cross", "self")
        }
        self._sums = {}
        return sums["cross"], sums["self"]

    def denoising_pass(self, latents: Tensor, timestep: Tensor, record: bool = False) -> Tensor:
        """The U-Net's prediction (2B, 4, H, W), unconditional half first, in the latents' precision.

        Args:
            latents: (B, 4, H, W). timestep: a scalar.
            record: add this pass to `self_map` and `cross_map`.
        """
        self._guiding, self._reading = False, self._shape_layers if record else frozenset()
        both = torch.cat([latents, latents]).to(self.text_states.dtype)
        return self.unet(both, timestep, encoder_hidden_states=self.text_states).sample.to(latents.dtype)

    @property
    def self_map(self) -> Tensor:
        return self._totals[0] / self._recorded["self"]

    @property
    def cross_map(self) -> Tensor:
        return self._totals[1] / self._recorded["cross"]

    def __enter__(self) -> Self:
        processors = {index: _MaskedProcessor(self, layer) for index, layer in self._layers.items()}
        self._installed = installed_processors(self.unet, processors)
        self._installed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._installed.__exit__(kind, error, trace)

    def attend(
        self, attn: nn.Module, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Attention of one layer, (B, heads, n, d), bounded and read as the pass asks for."""
        bias = self._bias(layer.kind, query)
        if layer.index not in self._reading:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)
        probabilities = attention_probabilities(attn, query, key, bias)
        if self._guiding:
            shapes = self._shapes_of(query.shape[2])
            context = self._subject_context() if layer.kind == "cross" else shapes
            self._sums[layer.index] = attention_sums(probabilities, shapes, context)
            if layer.index == max(self._reading):
                raise _LastLayerRead
        else:
            self._record(layer.kind, probabilities.chunk(2)[1].mean(dim=1))
        return probabilities.to(value.dtype) @ value

    def _record(self, kind: str, probabilities: Tensor) -> None:
        self_total, cross_total = self._totals
        if kind == "self":
            self_total = self_total + probabilities
        else:
            cross_total = cross_total + probabilities[..., self._leading]
        self._totals = self_total, cross_total
        self._recorded[kind] += 1

    def _subject_context(self) -> Tensor:
        """Bool (1, S, L): each subject's tokens and the first end-of-text token."""
        context = self._subject_tokens.clone()
        context[:, self._eos_index] = True
        return context[None]

    def _shapes_of(self, pixels: int) -> Tensor:
        """Bool (B or 1, S, n)."""
        if pixels not in self._shapes:
            self._shapes[pixels] = self._shapes_at(math.isqrt(pixels)).flatten(2)
        return self._shapes[pixels]

    def _bias(self, kind: str, query: Tensor) -> Tensor | None:
        """The mask of this pass as a bias in the query's precision: (1 or batch, 1, n, keys)."""
        if not self.masked:
            return None
        name = (self._guiding, kind, query.shape[2], query.dtype)
        if name not in self._biases:
            shapes = self._shapes_of(query.shape[2])
            mask = self._self_mask(shapes) if kind == "self" else self._cross_mask(shapes, len(query))
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
            self._biases[name] = bias.masked_fill_(~mask, -math.inf)[:, None]
        return self._biases[name]

    def _self_mask(self, shapes: Tensor) -> Tensor:
        """Bool (1, n, n) if all samples have the same shapes, else one for each row of the batch."""
        mask = self_attention_mask(shapes)
        return mask if self._guiding or len(mask) == 1 else torch.cat([mask, mask])

    def _cross_mask(self, shapes: Tensor, rows: int) -> Tensor:
        """Bool (1 or rows, n, L); the unconditional half of a denoising pass sees every token."""
        mask = cross_attention_mask(
            shapes, self._subject_tokens, self._filter_tokens, self._eos_index, self._guiding
        )
        if self._guiding:
            return mask
        mask = mask.expand(rows // 2, -1, -1)
        return torch.cat([torch.ones_like(mask), mask])


class _LastLayerRead(Exception):
    """Ends a guidance pass: nothing past this layer enters the loss."""


class _MaskedProcessor:
    """Attention processor of one layer: projections around `MaskedAttention.attend`."""

    def __init__(self, masking: MaskedAttention, layer: AttentionLayer) -> None:
        self.masking = masking
        self.layer = layer

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = project_heads(attn, hidden_states, encoder_hidden_states)
        return merge_heads(attn, self.masking.attend(attn, self.layer, query, key, value))
