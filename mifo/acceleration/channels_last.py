"""diffusers networks whose activations stay channels-last from their first convolution to their last."""

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from mifo.acceleration.gated_gelu import gated_gelu
from mifo.acceleration.group_norm import group_norm_silu


def keep_channels_last(network: nn.Module) -> None:
    """Have normalisations and transformers read and write channels-last memory, in place.

    Residual blocks, transformers and the last normalisation become instances of subclasses of their classes,
    which compute the same from the same parameters, and gated feed-forwards take one kernel for their
    product; blocks of other kinds stay as they are. Weights are laid out apart from this, by
    `network.to(memory_format=torch.channels_last)`. A second call changes nothing.

    Args:
        network: a `UNet2DConditionModel`, an `AutoencoderKL` or a part of it; names of parameters stay the
            same.
    """
    for module in list(network.modules()):
        if _is_ordinary(module):
            module.__class__ = _ResnetBlock2D
            module.norm1.__class__ = module.norm2.__class__ = _GroupNormSiLU
        elif _is_continuous(module):
            module.__class__ = _Transformer2DModel
            module.norm.__class__ = _GroupNorm
        elif type(module) is GEGLU:
            module.__class__ = _GEGLU
        last = getattr(module, "conv_norm_out", None)
        if _is_affine(last) and type(getattr(module, "conv_act", None)) is nn.SiLU:
            last.__class__ = _GroupNormSiLU
            module.conv_act = nn.Identity()


def _is_ordinary(module: nn.Module) -> bool:
    """Whether a module is a residual block of Stable Diffusion: GroupNorm, SiLU, no resampling."""
    return (
        type(module) is ResnetBlock2D
        # the autoencoder's decoder calls "group" what takes no time embedding
        and (module.time_embedding_norm == "default" or module.time_emb_proj is None)
        and module.upsample is None
        and module.downsample is None
        and type(module.nonlinearity) is nn.SiLU
        and _is_affine(module.norm1)
        and _is_affine(module.norm2)
    )


def _is_continuous(module: Any) -> bool:
    """Whether a module is a transformer over pixels whose output is made in a method of its own."""
    return (
        type(module) is Transformer2DModel
        and module.is_input_continuous
        and hasattr(module, "_get_output_for_continuous_inputs")
        and _is_affine(module.norm)
    )


def _is_affine(module: nn.Module | None) -> bool:
    return type(module) is nn.GroupNorm and module.affine


class _GroupNorm(nn.GroupNorm):
    silu = False

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.weight, self.bias, self.num_groups, self.eps, self.silu)


class _GroupNormSiLU(_GroupNorm):
    silu = True


class _ResnetBlock2D(ResnetBlock2D):
    """Its normalisations apply SiLU themselves."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **options: Any) -> Tensor:
        hidden = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None:
            activated = temb if self.skip_time_act else self.nonlinearity(temb)
            temb = self.time_emb_proj(activated)[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        summed = input_tensor + hidden
        # a division by 1 would still pass through memory
        return summed if self.output_scale_factor == 1 else summed / self.output_scale_factor


class _Transformer2DModel(Transformer2DModel):
    """Its output is a view of the tokens, which already lie channels-last."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class _GEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        return gated_gelu(self.proj(hidden_states))
