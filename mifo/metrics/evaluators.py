"""The models that judge pictures: an open_clip image–text model, and a transformers ViT or DreamSim.

Each knows its name and the hash of its weights, so that figures of different evaluators are never mixed.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import open_clip
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.nn import functional as F

from mifo.errors import MifoError, check_package
from mifo.files import WEIGHTS
from mifo.metrics.crops import pad_square
from mifo.metrics.scores import Evaluator
from mifo.metrics.settings import Fit, ImageSettings, ImageTextSettings, MetricsSettings

DREAMSIM_SIZE = 224  # side of the pictures that DreamSim was trained on

log = logging.getLogger(__name__)


class ImageEncoder(Protocol):
    """Encodes pictures (3, H, W) in [0, 1], of any sizes, into features (B, D) on the encoder's device."""

    evaluator: Evaluator

    def encode_images(self, images: Sequence[Tensor] | Tensor) -> Tensor: ...


class ImageTextEncoder(ImageEncoder, Protocol):
    """Encodes texts into features (B, D) too, comparable with those of pictures."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor: ...

    def warnings(self, texts: Sequence[str]) -> list[str]:
        """A line for each text of which the features leave something out."""
        ...


def weight_hash(model: nn.Module) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of every weight, in order of name.

    `pooler` weights are left out: they are not used, and transformers draws them at random where a model has
    none.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("pooler."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


class _BatchedEncoder(nn.Module):
    """Squares, resizes and normalises pictures, and encodes them batch by batch."""

    model: Any  # a network with the methods of its library
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        fit: Fit,
    ):
        super().__init__()
        self.fit = fit
        self.evaluator = Evaluator(f"{name}-stretched" if fit == Fit.stretch else name, weight_hash(model))
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.batch_size = batch_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def _prepare(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """The model's input, (B, 3, S, S); pictures of one size are brought there together."""
        prepared = self.mean.new_empty(len(images), 3, self.image_size, self.image_size)
        of_size: dict[torch.Size, list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            of_size[image.shape].append(index)
        for same in of_size.values():
            batch = torch.stack([images[index] for index in same]).to(self.mean)
            square = pad_square(batch) if self.fit == Fit.pad else batch
            size = (self.image_size, self.image_size)
            resized = F.interpolate(square, size, mode="bicubic", antialias=True).clamp(0, 1)
            prepared[same] = (resized - self.mean) / self.std
        return prepared

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Encode pictures (3, H, W) in [0, 1] into (B, D); each is made square by `fit` first."""
        return torch.cat([self._features(batch) for batch in self._prepare(images).split(self.batch_size)])

    def _features(self, batch: Tensor) -> Tensor:
        raise NotImplementedError


class OpenClipEncoder(_BatchedEncoder):
    """An open_clip model as evaluator of images and texts."""

    def __init__(self, model: nn.Module, tokenizer, name: str, batch_size: int, fit: Fit):
        preprocessing = open_clip.get_model_preprocess_cfg(model)
        size = preprocessing["size"]
        super().__init__(
            model,
            name,
            size if isinstance(size, int) else size[0],
            preprocessing.get("mean") or open_clip.OPENAI_DATASET_MEAN,
            preprocessing.get("std") or open_clip.OPENAI_DATASET_STD,
            batch_size,
            fit,
        )
        self.tokenizer = tokenizer

    def _features(self, batch: Tensor) -> Tensor:
        return self.model.encode_image(batch)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, cut to the model's context length, into features (B, D)."""
        tokens = self.tokenizer(list(texts)).to(self.mean.device)
        return torch.cat([self.model.encode_text(batch) for batch in tokens.split(self.batch_size)])

    def warnings(self, texts: Sequence[str]) -> list[str]:
        """A line for each text that is longer than the model reads."""
        tokens = self.tokenizer(list(texts))
        length = tokens.shape[1]
        # with room for one token more, a text that is cut has another token at the end
        cut = (self.tokenizer(list(texts), context_length=length + 1)[:, :length] != tokens).any(1)
        return [
            f"{self.evaluator.name} reads {length} tokens and leaves out the end of the prompt {text!r}, "
            "which its scores do not tell."
            for text in dict.fromkeys(text for text, is_cut in zip(texts, cut, strict=True) if is_cut)
        ]


class ViTEncoder(_BatchedEncoder):
    """A transformers ViT (DINO, DINOv2, the miniature's) whose CLS feature describes a picture."""

    def _features(self, batch: Tensor) -> Tensor:
        resized = self.image_size != self.model.config.image_size
        options = {"interpolate_pos_encoding": True} if resized else {}
        return self.model(pixel_values=batch, **options).last_hidden_state[:, 0]


class DreamSimEncoder(_BatchedEncoder):
    """DreamSim (arXiv 2306.09344): its distance, [0, 2], is 1 − the cosine of the features given here.

    So what a metric measures with it is a similarity as with every encoder, [−1, 1], higher is more alike.
    """

    def __init__(self, model: nn.Module, name: str, batch_size: int, fit: Fit):
        # DreamSim normalises by itself, for each of its backbones in another way
        super().__init__(model, name, DREAMSIM_SIZE, (0.0,) * 3, (1.0,) * 3, batch_size, fit)

    def _features(self, batch: Tensor) -> Tensor:
        return self.model.embed(batch)


def load_image_text_encoder(
    settings: ImageTextSettings, batch_size: int = 32, fit: Fit = Fit.pad
) -> OpenClipEncoder:
    """Load the open_clip model of `settings`, on the CPU in fp32. Raises MifoError without its weights."""
    name, weights = settings.name, settings.pretrained
    if name == "embedded":
        name = f"local-dir:{WEIGHTS / 'clip'}"
    with _loading("metrics.image_text", f"{settings.name}-{weights}" if weights else settings.name):
        known = open_clip.get_pretrained_cfg(name, weights) if weights else {}
        model = open_clip.create_model(
            name,
            pretrained=weights,
            require_pretrained=True,
            # weights such as OpenAI's were learned with another GELU, which the name does not say
            force_quick_gelu=known.get("quick_gelu", False),
        )
        tokenizer = open_clip.get_tokenizer(name)
    label = _label(settings.name.removeprefix("local-dir:"), "miniature-clip")
    return OpenClipEncoder(model, tokenizer, f"{label}-{weights}" if weights else label, batch_size, fit)


def check_evaluators(settings: MetricsSettings) -> None:
    """Refuse evaluators that cannot be had, without loading one; those not yet downloaded are warned of.

    Raises:
        MifoError: an unknown name, or a package that is not installed.
    """
    image, text = settings.image.source, settings.image_text
    if image.partition(":")[0] == "dreamsim":
        check_package(f"metrics.image.source={image}", "dreamsim", "standard_metrics")
    if text.name != "embedded" and not text.name.startswith("local-dir:"):
        if text.name not in open_clip.list_models():
            raise MifoError(f"metrics.image_text.name={text.name} is no model of open_clip; take ViT-L-14.")
        known = open_clip.list_pretrained_tags_by_model(text.name)
        if text.pretrained not in known:
            raise MifoError(
                f"metrics.image_text.pretrained={text.pretrained} is not known; take of {', '.join(known)}."
            )
    on_hub = image != "embedded" and not image.startswith("dreamsim") and not Path(image).is_dir()
    found = try_to_load_from_cache(image, "config.json", revision=settings.image.revision) if on_hub else ""
    if not isinstance(found, str):
        log.warning("The evaluators are not here yet; the first scores download them, or take metrics=none.")


def load_image_encoder(
    settings: ImageSettings, batch_size: int = 32, fit: Fit = Fit.pad, device: torch.device | str = "cpu"
) -> ViTEncoder | DreamSimEncoder:
    """Load the ViT or the DreamSim of `settings` in fp32. Raises MifoError without its weights."""
    name, _, variant = settings.source.partition(":")
    if name == "dreamsim":
        return _load_dreamsim(settings, variant or "ensemble", batch_size, fit, device)
    source = str(WEIGHTS / "vit") if settings.source == "embedded" else settings.source
    revision = settings.revision or "main"
    with _loading("metrics.image", settings.source):
        model = transformers.AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        processor = transformers.AutoImageProcessor.from_pretrained(source, revision=revision)
    image_size = settings.image_size or model.config.image_size
    label = f"{_label(settings.source, 'miniature-vit')}-{image_size}"
    encoder = ViTEncoder(model, label, image_size, processor.image_mean, processor.image_std, batch_size, fit)
    return encoder.to(device)


def _load_dreamsim(
    settings: ImageSettings, variant: str, batch_size: int, fit: Fit, device: torch.device | str
) -> DreamSimEncoder:
    """Load DreamSim on the device where it will run, since `to` does not move all of its tensors."""
    check_package(f"metrics.image.source={settings.source}", "dreamsim", "standard_metrics")
    from dreamsim import dreamsim

    if settings.revision or settings.image_size not in (None, DREAMSIM_SIZE):
        raise MifoError(
            f"DreamSim has one revision and sees {DREAMSIM_SIZE} pixels: leave metrics.image.revision and "
            "metrics.image.image_size null."
        )
    hub = torch.hub.get_dir()
    cache = Path(hub) / "dreamsim"
    try:
        with _loading("metrics.image.source (dreamsim, dreamsim:dino_vitb16, …)", settings.source):
            cache.mkdir(parents=True, exist_ok=True)
            model, _ = dreamsim(device=str(device), cache_dir=str(cache), dreamsim_type=variant)
    finally:
        torch.hub.set_dir(hub)  # which DreamSim points to its own folder, for the whole process
    return DreamSimEncoder(model, f"dreamsim-{variant}", batch_size, fit).to(device)


def _label(source: str, embedded: str) -> str:
    """Name an evaluator; a folder goes by its own name, since its place does not change its figures."""
    if source == "embedded":
        return embedded
    return Path(source).name if Path(source).is_dir() else source


@contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """Hold back the many lines that libraries log while they load; turn what they raise into a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, BadZipFile) as error:
        raise MifoError(
            f"The evaluator {name} cannot be loaded: check {key}, connect once to fetch its weights, or use "
            f"metrics=miniature, which needs no network ({error})."
        ) from error
    finally:
        logging.disable(before)
