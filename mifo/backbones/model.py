"""What the framework asks of a model beyond the method: where it lies, what learns, new words, identity.

Letters: B samples, L tokens, N new words.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mifo.errors import MifoError
from mifo.method.backbone import Backbone, Conditioning, Rules, Site
from mifo.method.prompts.instances import PromptWords

# keys of a model's identity that say where it came from
ORIGIN = ("name", "source", "revision", "fingerprint")
Trainable = Literal["tokens", "cross_attention_kv", "denoiser", "full", "lora"]


class DiffusionModel(Backbone, ABC):
    """A text-to-image model with everything that learning, making and saving need.

    Attributes:
        name, source, revision: where it came from.
        fingerprint: tells base weights apart; it does not depend on where they lie, how they are sharded, or
            the dtype they are loaded in.
    """

    name: str
    source: str
    revision: str | None
    fingerprint: str
    checkpointing = False  # whether activations are computed twice instead of kept
    distilled = False  # whether it was made to do without guidance, in few steps

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, Any]:
        """The networks that can learn, by the name under which their weights are saved."""

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The denoising network."""

    @property
    @abstractmethod
    def autoencoder(self) -> Any:
        """The network between pictures and latents."""

    @abstractmethod
    def enable_checkpointing(self) -> None:
        """Compute activations of the networks twice instead of keeping them."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of a picture, in pixels."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move every part to `device`, in place."""

    @abstractmethod
    def identity(self) -> dict[str, str | None]:
        """Name, source, revision, fingerprint, and what else must be the same for a learned result to fit."""

    @abstractmethod
    def sampling(self) -> str:
        """What changes the pictures of plain sampling, beside weights, prompt, seed and steps."""

    @abstractmethod
    def words(self, prompt: str) -> PromptWords:
        """The words of a prompt and where they stand in the conditioning sequence.

        Raises:
            MifoError: the prompt is too long for the model.
        """

    @abstractmethod
    def add_words(
        self, tokens: Sequence[str], initializers: Sequence[str | None] | None = None, seed: int = 0
    ) -> None:
        """Teach the model, in place, N new words, each with a row in every table of its text encoders.

        Args:
            tokens: the new words, "<asset0>", "<asset1>", …
            initializers: a word or phrase for each new word whose mean embedding its rows start from; None:
                the table's mean with a little noise, as resized tables start.
            seed: of the noise.

        Raises:
            MifoError: a word is known already, the model has new words already, or an initializer is empty.
        """

    @property
    @abstractmethod
    def new_words(self) -> tuple[str, ...]:
        """The words that `add_words` taught the model."""

    @property
    @abstractmethod
    def new_rows(self) -> dict[str, nn.Parameter]:
        """The rows (N, width) of the new words, by the name of the network whose table they follow."""

    @abstractmethod
    def places(self, ids: Tensor, word: str) -> Tensor:
        """Where a new word stands in prompts of one sample's `ids`: its positions."""

    @abstractmethod
    def trainable(self, what: Trainable) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that learn beside the new rows, by network and by name.

        Args:
            what: "tokens" none (Textual Inversion, arXiv 2208.01618); "cross_attention_kv" the keys and
                values of the prompt (Custom Diffusion, arXiv 2212.04488); "denoiser" the whole denoising
                network; "full" text encoders too; "lora" the adapters that `add_lora` made. Tables of known
                words never learn.
        """

    @abstractmethod
    def check_attention(
        self, noisy: Tensor, time: Tensor, conditioning: Conditioning, reads: Sequence[Site], rules: Rules
    ) -> None:
        """Compare the maps and the bounded attention of one pass with dense attention on a few queries.

        Args:
            noisy, time, conditioning: see `predict`. reads: sites whose maps are compared.
            rules: by which attention is bounded at all sites.

        Raises:
            MifoError: they differ; it names the site.
        """

    @abstractmethod
    def add_lora(self, rank: int) -> None:
        """Put low-rank adapters (LoRA, arXiv 2106.09685) on the attention projections of all networks."""

    def check_scale(self, key: str, scale: float) -> None:
        """Refuse a scale of classifier-free guidance, the setting `key`, if the model does without."""
        if self.distilled and scale != 1:
            raise MifoError(
                f"{key}={scale} is for models with classifier-free guidance, but {self.name} was distilled "
                f"to do without; take {key}=1."
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What prompts become for the network, for sampling."""
        return self.encode(self.tokenize(prompts))

    def set_trainable(self, what: Trainable) -> None:
        """Let the new rows and what `trainable` names learn, and freeze everything else."""
        for network in self.networks.values():
            network.requires_grad_(False)
        for parameters in [*self.trainable(what).values(), self.new_rows]:
            for parameter in parameters.values():
                parameter.requires_grad_(True)

    def freeze(self) -> None:
        """Nothing learns any more, and layers that behave otherwise in learning are switched."""
        for network in self.networks.values():
            network.requires_grad_(False).eval()
