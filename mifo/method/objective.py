"""What both stages of learning minimise: denoising in the masks, prior preservation and an attention loss.

B batch, K selected instances, L tokens, C × h × w latents, H × W masks, R² pixels of an attention map.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mifo.backbones.unet.recording import AttentionRecorder
from mifo.method.diffusion.denoising import denoising_loss, union_mask
from mifo.method.diffusion.noise_schedule import NoiseSchedule
from mifo.method.losses.active import attention_loss, timestep_gate
from mifo.method.losses.settings import TermSettings


@dataclass(frozen=True)
class StepInputs:
    """The tensors of one learning step.

    Attributes:
        latents: clean latents, (P + B, C, h, w): P class samples (or none), then B instance samples.
        noise: of the same shape.
        timesteps: (P + B,) integers.
        encoder_hidden_states: prompts' embeddings, (P + B, L, width).
        token_positions: place in its prompt of each selected instance's token, (B, K) integers below L.
        masks: of the selected instances, (B, K, H, W) in [0, 1]; they may overlap.
        valid: (B, K), 1 for a selected instance, 0 for padding, whose other entries do not matter.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    token_positions: Tensor
    masks: Tensor
    valid: Tensor


@dataclass(frozen=True)
class LossParts:
    """A loss, the weighted parts that add up to it, and the attention maps behind it.

    Attributes:
        total: denoising + prior + attention, a scalar, as all of them.
        denoising: on the instance samples, inside the union of their masks.
        prior: weighted loss on the class samples; 0 without class samples.
        attention: weighted attention loss; 0 for samples whose timestep is at or above the limit.
        maps: by layer, the instances' cross-attention maps, (B, R², K), detached.
    """

    total: Tensor
    denoising: Tensor
    prior: Tensor
    attention: Tensor
    maps: dict[int, Tensor]


def semantic_loss(
    unet: Callable[..., Tensor],
    recorder: AttentionRecorder,
    schedule: NoiseSchedule,
    inputs: StepInputs,
    attention: TermSettings,
    timestep_limit: int,
) -> LossParts:
    """Stage 1, semantic learning (MIFO, arXiv 2511.00542): masked denoising and an attention loss.

    Args:
        unet: a diffusers U-Net or what wraps it, called as `unet(noisy, timesteps, encoder_hidden_states)`.
        recorder: entered on that U-Net, with the layers that the attention loss reads.
        schedule: on the device of the latents.
        inputs: without class samples.
        attention: the attention loss that is active at this step and its weight.
        timestep_limit: the attention loss counts only for samples with a smaller timestep.
    """
    return finetuning_loss(unet, recorder, schedule, inputs, attention, timestep_limit, prior_weight=0.0)


def finetuning_loss(
    unet: Callable[..., Tensor],
    recorder: AttentionRecorder,
    schedule: NoiseSchedule,
    inputs: StepInputs,
    attention: TermSettings,
    timestep_limit: int,
    prior_weight: float,
) -> LossParts:
    """Stage 2, fine-tuning: the loss of stage 1, and DreamBooth's prior preservation on class samples.

    The attention loss is gated by the timesteps of the instance samples alone. Other arguments are those of
    `semantic_loss`.

    Args:
        prior_weight: weight of the denoising loss on the class samples (DreamBooth, arXiv 2208.12242, eq. 2).
    """
    recorder.token_positions = inputs.token_positions
    noisy = schedule.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
    prediction = unet(noisy, inputs.timesteps, inputs.encoder_hidden_states, return_dict=False)[0]
    maps = {layer: recorder.probabilities.pop(layer) for layer in recorder.layers}
    target = schedule.target(inputs.latents, inputs.noise, inputs.timesteps)

    classes = len(inputs.latents) - len(inputs.token_positions)
    union = union_mask(inputs.masks, inputs.valid, inputs.latents.shape[-2:])
    denoising = denoising_loss(prediction[classes:], target[classes:], union)
    prior = denoising.new_zeros(())
    if classes:
        prior = prior_weight * denoising_loss(prediction[:classes], target[:classes])
    gate = timestep_gate(inputs.timesteps[classes:], timestep_limit)
    attended = attention.weight * attention_loss(attention.term, maps, inputs.masks, inputs.valid, gate)
    return LossParts(
        total=denoising + prior + attended,
        denoising=denoising,
        prior=prior,
        attention=attended,
        maps={layer: each.detach() for layer, each in maps.items()},
    )
