"""Attention bounded by boxes or shapes in every layer of a U-Net, and what is read from it during synthesis.

Bounded Attention (arXiv 2403.16990) as MIFO (arXiv 2511.00542) uses it. There are two kinds of pass: a
*guidance* pass runs the conditional half alone, up to the last layer that the loss reads; a *denoising* pass
runs both halves, the unconditional first, and can add its maps to the running means from which shapes are
renewed.

Letters: B samples, S subjects, L tokens of the prompt, n = R² pixels of a layer.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mifo.acceleration.bounded_attention import bounded_attention, runs_as_kernels, sees
from mifo.acceleration.graphs import GraphedFunction
from mifo.backbones.unet.layers import AttentionLayer, attention_layers
from mifo.backbones.unet.processors import (
    attention_probabilities,
    installed_processors,
    merge_heads,
    project_context,
    project_queries,
    quick_to_start,
)
from mifo.method.guidance.descent import loss_and_gradient
from mifo.method.guidance.loss import attention_sums
from mifo.method.guidance.settings import GuidanceSettings

MOST_SUBJECTS = 27  # each has a bit of 32
# bits of words that are closed to all, words open to all, the first end-of-text token, and the background
_FILTER, _OPEN, _END, _BACKGROUND = (1 << place for place in range(27, 31))
_ALL = -1


def cross_attention_bits(
    shapes: Tensor, subject_tokens: Tensor, filter_tokens: Tensor, eos_index: int, guidance: bool
) -> tuple[Tensor, Tensor]:
    """Which tokens each pixel may attend to: those with which it has a bit in common.

    A subject's tokens are closed outside its own pixels, filter tokens (function words) everywhere, and the
    first end-of-text token on the background. In guidance passes the background may attend to every subject
    and to the end-of-text token.

    Args:
        shapes: bool (B, S, n), the pixels of each subject; the background is what no subject has.
        subject_tokens: bool (S, L), no token of two subjects. filter_tokens: bool (L,).

    Returns:
        int32 (B, n) of the pixels and (1, L) of the tokens.
    """
    background = ~shapes.any(dim=1)
    pixels = _memberships(shapes) | _OPEN
    if guidance:
        pixels = torch.where(background, _ALL ^ _FILTER, pixels | _END)
    else:
        pixels = torch.where(background, pixels, pixels | _END)
    tokens = _memberships(subject_tokens[None])
    tokens = torch.where(tokens == 0, _OPEN, tokens)
    tokens[:, eos_index] = _END
    return pixels, tokens.masked_fill(filter_tokens, _FILTER)


def self_attention_bits(shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels see each other: those with a subject in common, and any with the background.

    Pixels where shapes overlap belong to all of their subjects.

    Args:
        shapes: bool (B, S, n).

    Returns:
        int32 (B, n) of the pixels as queries and as keys, which are open where they have a bit in common.
    """
    own = _memberships(shapes)
    return torch.where(own == 0, _ALL, own | _BACKGROUND), torch.where(own == 0, _BACKGROUND, own)


def _memberships(rows: Tensor) -> Tensor:
    """A bit for each of the S rows that is set: bool (B, S, n) to int32 (B, n)."""
    bits = torch.tensor([1 << row for row in range(rows.shape[1])], dtype=torch.int32, device=rows.device)
    return (rows * bits[:, None]).sum(dim=1, dtype=torch.int32)


class MaskedAttention:
    """Runs a U-Net, within a `with` block, with attention bounded by the pixels of each subject.

    Layers whose probabilities are read compute them in the open and in 32 bits, all others use fused
    attention, which on a GPU reads no mask but bits of pixels and tokens. Masks are made once for each set of
    shapes, kind of pass and resolution, keys and values once for each prompt. The processors found before are
    put back on leaving, also after an exception.

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
        graphs: bool = False,
        settings: GuidanceSettings | None = None,
    ) -> None:
        """Take the prompt and the layers to read.

        Args:
            text_states: (2B, L, width), unconditional rows first.
            subject_tokens: positions of each subject's tokens in the prompt, the leading one last.
            guidance_layers, shape_layers: `AttentionLayer.index`; the shape layers are of one resolution.
            masked: bound attention; else it is only read.
            graphs: replay both kinds of pass as CUDA graphs.
            settings: the weights of the guidance loss; None: the published ones.
        """
        self.unet = unet
        self._settings = settings or GuidanceSettings()
        self.masked = masked
        self._layers = {layer.index: layer for layer in attention_layers(unet)}
        self._guidance_layers = frozenset(guidance_layers)
        self._shape_layers = frozenset(shape_layers)
        self._prompt = _Prompt.of(text_states, subject_tokens, filter_indices, eos_index)
        self._eos_index = eos_index
        self._reading: frozenset[int] = frozenset()
        self._guiding = False
        self._read: dict[int, Tensor] = {}
        self._totals: dict[str, Tensor | float] = {"self": 0.0, "cross": 0.0}
        self._passes = 0
        self._text: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[_MaskName, Tensor] = {}
        self._graphs = graphs
        self._guidance = GraphedFunction(self._guidance_iteration, graphs)
        self._denoising = {
            record: GraphedFunction(partial(self._prediction_and_maps, record), graphs)
            for record in (False, True)
        }
        self._installed: AbstractContextManager[None] | None = None

    def turn_to(
        self,
        text_states: Tensor,
        subject_tokens: Sequence[Sequence[int]],
        filter_indices: Sequence[int],
        eos_index: int,
    ) -> None:
        """Take another prompt of as many rows, tokens and subjects, and begin new means; call `bound` next.

        What a captured pass reads is overwritten where it lies.
        """
        new = _Prompt.of(text_states, subject_tokens, filter_indices, eos_index)
        for old, value in zip(self._prompt, new, strict=True):
            old.copy_(value)
        self._eos_index = eos_index
        for index, heads in self._text.items():
            attn = self.unet.get_submodule(self._layers[index].name)
            with torch.no_grad():
                for old, value in zip(heads, project_context(attn, text_states), strict=True):
                    old.copy_(value)
        self._totals, self._passes = {"self": 0.0, "cross": 0.0}, 0

    def bound(self, shapes_at: Callable[[int], Tensor]) -> None:
        """Bound attention by shapes from now on.

        Args:
            shapes_at: gives for the side R of a map bool shapes (B or 1, S, R, R) on the U-Net's device.
        """
        self._shapes_at = shapes_at
        before, self._masks = self._masks, {}
        if not self._graphs:
            return
        # A captured pass reads its masks where they lay: they are overwritten while their form is the same
        for name, old in before.items():
            new = self._mask(name)
            if new.shape != old.shape:
                for captured in (self._guidance, *self._denoising.values()):
                    captured.forget()
                return
            self._masks[name] = old.copy_(new)

    def guidance_pass(self, latents: Tensor, timestep: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The sums F, B of `attention_sums` for each cross layer and each self layer that the loss reads.

        Args:
            latents: (B, 4, H, W). timestep: a scalar.

        Returns:
            One (2, B, S) for each layer, differentiable with respect to the latents.
        """
        sums = self._guidance_sums(latents, timestep)
        cross, own = (
            [each for index, each in sums.items() if self._layers[index].kind == kind]
            for kind in ("cross", "self")
        )
        return cross, own

    def guidance_gradient(
        self, latents: Tensor, timestep: Tensor, alphas: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """`loss_and_gradient` of the latents by one guidance pass; the next call overwrites what it returns.

        Args:
            latents: (B, 4, H, W). timestep: a scalar.
        """
        return self._guidance(latents, timestep, torch.tensor(alphas, device=latents.device))

    def _guidance_iteration(self, latents: Tensor, timestep: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        def read(z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return self.guidance_pass(z, timestep)

        return loss_and_gradient(latents, read, alphas, self._settings)

    def denoising_pass(self, latents: Tensor, timestep: Tensor, record: bool = False) -> Tensor:
        """The U-Net's prediction (2B, 4, H, W), unconditional half first, in the latents' precision.

        Args:
            latents: (B, 4, H, W). timestep: a scalar.
            record: add this pass to `self_map` and `cross_map`.
        """
        prediction, maps = self._denoising[record](latents, timestep)
        for kind, each in maps.items():
            self._totals[kind] = self._totals[kind] + each
        self._passes += record
        return prediction

    def _guidance_sums(self, latents: Tensor, timestep: Tensor) -> dict[int, Tensor]:
        """The sums (2, B, S) by layer."""
        self._guiding, self._reading, self._read = True, self._guidance_layers, {}
        conditional = self._prompt.text_states.chunk(2)[1]
        with suppress(_LastLayerRead):
            self.unet(latents.to(conditional.dtype), timestep, encoder_hidden_states=conditional)
        sums, self._read = self._read, {}
        return sums

    def _prediction_and_maps(
        self, record: bool, latents: Tensor, timestep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction, and the mean of the maps of each kind if they are recorded."""
        self._guiding, self._reading, self._read = False, self._shape_layers if record else frozenset(), {}
        text_states = self._prompt.text_states
        both = torch.cat([latents, latents]).to(text_states.dtype)
        prediction = self.unet(both, timestep, encoder_hidden_states=text_states).sample
        maps, self._read = self._read, {}
        means = {}
        for kind in ("self", "cross") if record else ():
            each = [maps[index] for index in maps if self._layers[index].kind == kind]
            means[kind] = torch.stack(each).mean(0)
        return prediction.to(latents.dtype), means

    @property
    def self_map(self) -> Tensor:
        return self._totals["self"] / self._passes

    @property
    def cross_map(self) -> Tensor:
        return self._totals["cross"] / self._passes

    def __enter__(self) -> Self:
        processors = {index: _MaskedProcessor(self, layer) for index, layer in self._layers.items()}
        self._installed = installed_processors(self.unet, processors)
        self._installed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._installed.__exit__(kind, error, trace)

    def attend(self, attn: nn.Module, layer: AttentionLayer, hidden_states: Tensor) -> Tensor:
        """Attention of one layer, (B, heads, n, d), bounded and read as the pass asks for."""
        query = project_queries(attn, hidden_states)
        if layer.kind == "cross":
            key, value = self._text_heads(attn, layer)
        else:
            key, value = project_context(attn, hidden_states)
        pixels, form = query.shape[2], (self._guiding, layer.kind, len(query))
        if (
            layer.index not in self._reading
            and self.masked
            and runs_as_kernels(query, key, value, attn.scale)
        ):
            bits = (self._mask((pixels, (*form, part))) for part in ("queries", "keys"))
            return bounded_attention(query, key, value, *bits, attn.scale)
        bias = self._mask((pixels, (*form, query.dtype))) if self.masked else None
        if layer.index not in self._reading:
            with quick_to_start(pixels):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attn.scale)
        probabilities = attention_probabilities(attn, query, key, bias)
        if self._guiding:
            shapes = self._mask((pixels, None))
            context = self._prompt.subject_context if layer.kind == "cross" else shapes
            self._read[layer.index] = attention_sums(probabilities, shapes, context)
            if layer.index == max(self._reading):
                raise _LastLayerRead
        else:
            conditional = probabilities.chunk(2)[1].mean(dim=1)
            kept = conditional if layer.kind == "self" else conditional[..., self._prompt.leading]
            self._read[layer.index] = kept
        return probabilities.to(value.dtype) @ value

    @torch.no_grad()
    def _text_heads(self, attn: nn.Module, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, which stays the same; of its conditional half in guidance passes."""
        if layer.index not in self._text:
            self._text[layer.index] = project_context(attn, self._prompt.text_states)
        key, value = self._text[layer.index]
        return (key.chunk(2)[1], value.chunk(2)[1]) if self._guiding else (key, value)

    def _mask(self, name: "_MaskName") -> Tensor:
        """What bounds attention: shapes, bits of queries or keys, or a bias; see `_MaskName`."""
        if name not in self._masks:
            pixels, form = name
            self._masks[name] = (
                self._shapes_at(math.isqrt(pixels)).flatten(2)
                if form is None
                else self._bounds(pixels, *form)
            )
        return self._masks[name]

    def _bounds(self, pixels: int, guiding: bool, kind: str, rows: int, form: str | torch.dtype) -> Tensor:
        """Bits, int32 (1 or rows, n) or (1 or rows, keys), or a bias (1 or rows, 1, n, keys)."""
        shapes = self._mask((pixels, None))
        if kind == "self":
            queries, keys = self_attention_bits(shapes)
            if not guiding and len(shapes) > 1:
                queries, keys = (torch.cat([each, each]) for each in (queries, keys))
        else:
            queries, keys = cross_attention_bits(
                shapes, self._prompt.subject_tokens, self._prompt.filter_tokens, self._eos_index, guiding
            )
            if not guiding:  # the unconditional half sees every token
                queries = queries.expand(rows // 2, -1)
                queries = torch.cat([torch.full_like(queries, _ALL), queries])
        if form in ("queries", "keys"):
            return queries if form == "queries" else keys
        mask = sees(queries, keys)[:, None]
        return torch.zeros(mask.shape, dtype=form, device=mask.device).masked_fill_(~mask, -math.inf)


# pixels of the layer; then None for the shapes, else whether guiding, kind, rows of the batch, and "queries"
# or "keys" for their bits or the precision of a bias
_MaskName = tuple[int, tuple[bool, str, int, str | torch.dtype] | None]


class _Prompt(NamedTuple):
    """What the passes read of a prompt.

    Attributes:
        text_states: (2B, L, width), unconditional rows first.
        subject_tokens: bool (S, L). filter_tokens: bool (L,).
        subject_context: bool (1, S, L), what the loss reads: a subject's tokens and the first end-of-text.
        leading: (S,) position of each subject's leading token.
    """

    text_states: Tensor
    subject_tokens: Tensor
    filter_tokens: Tensor
    subject_context: Tensor
    leading: Tensor

    @classmethod
    def of(
        cls,
        text_states: Tensor,
        subject_tokens: Sequence[Sequence[int]],
        filter_indices: Sequence[int],
        eos_index: int,
    ) -> Self:
        tokens, device = text_states.shape[1], text_states.device
        own = torch.zeros(len(subject_tokens), tokens, dtype=torch.bool)
        for row, positions in zip(own, subject_tokens, strict=True):
            row[list(positions)] = True
        filtered = torch.zeros(tokens, dtype=torch.bool)
        filtered[list(filter_indices)] = True
        context = own.clone()[None]
        context[..., eos_index] = True
        leading = torch.tensor([positions[-1] for positions in subject_tokens])
        # a copy, since the next prompt's states will overwrite it
        return cls(text_states.clone(), *(each.to(device) for each in (own, filtered, context, leading)))


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
        return merge_heads(attn, self.masking.attend(attn, self.layer, hidden_states))
