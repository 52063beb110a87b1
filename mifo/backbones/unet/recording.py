"""Attention maps read off the U-Net while it runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from mifo.backbones.unet.layers import attention_layers
from mifo.backbones.unet.processors import (
    attention_probabilities,
    head_bias,
    installed_processors,
    merge_heads,
    project_heads,
)
from mifo.errors import MifoError


class AttentionRecorder:
    """Keeps, within a `with` block, the attention probabilities of chosen layers at each forward pass.

    The chosen layers compute their softmax in the open and in 32 bits, others use fused attention. Maps pass
    gradients. Nothing in the forward pass waits for the device or depends on values, so it can be compiled
    and captured. The processors found before are put back on leaving, also after an exception.

    Attributes:
        probabilities: by `AttentionLayer.index`, the mean over heads at the last forward pass, float32:
            (B, R², L or R²) of all rows and keys while `token_positions` is `None`, else (b, R², K).
        token_positions: (b, K) integers on the U-Net's device: the token columns to keep, of the LAST b rows
            of the batch, so that class samples or an unconditional half come first. Set it anew at any time.

    Raises:
        MifoError: a layer number that the U-Net does not have.
    """

    def __init__(self, unet: nn.Module, layers: Sequence[int], token_positions: Tensor | None = None) -> None:
        count = len(attention_layers(unet))
        if unknown := [layer for layer in layers if not 0 <= layer < count]:
            raise MifoError(
                f"The U-Net has attention layers 0 to {count - 1}, so layer {unknown[0]} cannot be read."
            )
        self.unet = unet
        self.layers = tuple(layers)
        self.token_positions = token_positions
        self.probabilities: dict[int, Tensor] = {}
        self._installed: AbstractContextManager[None] | None = None

    def __enter__(self) -> Self:
        self._installed = installed_processors(
            self.unet, {layer: _RecordingAttention(self, layer) for layer in self.layers}
        )
        self._installed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._installed.__exit__(kind, error, trace)


class _RecordingAttention:
    """Processor that attends with explicit probabilities and leaves their mean with the recorder."""

    def __init__(self, recorder: AttentionRecorder, layer: int) -> None:
        self.recorder = recorder
        self.layer = layer

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = project_heads(attn, hidden_states, encoder_hidden_states)
        probabilities = attention_probabilities(attn, query, key, head_bias(attn, attention_mask, key))
        self.recorder.probabilities[self.layer] = _columns(probabilities, self.recorder.token_positions)
        return merge_heads(attn, probabilities.to(value.dtype) @ value)


def _columns(probabilities: Tensor, token_positions: Tensor | None) -> Tensor:
    """Mean over heads of (B, heads, R², L), of the given (b, K) columns of the last b rows only, if given."""
    if token_positions is None:
        return probabilities.mean(1)
    rows, tokens = token_positions.shape
    index = token_positions[:, None, None, :].expand(-1, *probabilities.shape[1:3], tokens)
    return probabilities[-rows:].gather(-1, index).mean(1)
