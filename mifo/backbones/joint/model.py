"""A latent diffusion model whose denoising network is a transformer of joint attention, on a flow."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from mifo.backbones.configs import Config, Configs
from mifo.backbones.joint.network import JointNetwork
from mifo.backbones.latent import LatentModel
from mifo.backbones.schedulers import flow_of
from mifo.backbones.settings import ModelSettings
from mifo.errors import check_known
from mifo.method.diffusion.flow import Flow, Timesteps


@dataclass(kw_only=True)
class JointModel(LatentModel):
    """`whole_row`: see `JointAttention`. `timesteps`: see `Flow`."""

    part = "transformer"
    sampled: ClassVar[tuple[str, ...]] = ("shift", "num_train_timesteps")
    prediction_type = Flow.prediction_type

    transformer: Any  # of diffusers
    timesteps: Timesteps = Timesteps.logit_normal
    whole_row: bool = False

    @classmethod
    def options(cls, settings: ModelSettings, index: Config, configs: Configs) -> dict[str, Any]:
        check_known("model.timesteps", settings.timesteps, Timesteps)
        check_known("model.maps", settings.maps, ("own", "row"))
        return {"timesteps": Timesteps(settings.timesteps), "whole_row": settings.maps == "row"}

    @cached_property
    @abstractmethod
    def attentive(self) -> JointNetwork: ...

    @cached_property
    def process(self) -> Flow:
        return flow_of(self.noise_scheduler, self.timesteps)

    def identity(self) -> dict[str, str | None]:
        return super().identity() | {"vae_shift_factor": str(self.vae.config.get("shift_factor") or 0)}
