"""Makes the miniature's weights: draws the corpus, trains the named parts, writes ordinary model folders."""

import logging
import shutil
import time
from functools import cache
from math import inf
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import ViTImageProcessor

from mifo.errors import MifoError, check_known, check_least
from mifo.files import WEIGHTS
from mifo.miniature.pretraining.autoencoder import (
    AutoencoderPretraining,
    DecoderPretraining,
    build_autoencoder,
    encode_corpus,
)
from mifo.miniature.pretraining.clip import MEAN, STD, ClipPretraining, build_clip, save_clip
from mifo.miniature.pretraining.corpus import draw_corpus
from mifo.miniature.pretraining.denoiser import DenoiserPretraining, Painter, build_scheduler, build_unet
from mifo.miniature.pretraining.segmenter import Segmenter, SegmenterPretraining, save_segmenter
from mifo.miniature.pretraining.settings import PARTS, PretrainSettings
from mifo.miniature.pretraining.text_encoder import TextEncoderPretraining, build_text_encoder
from mifo.miniature.pretraining.training import Pretraining, fit
from mifo.miniature.pretraining.transformer import FlowPainter, TransformerPretraining, build_flow_scheduler
from mifo.miniature.pretraining.vit import VitPretraining, build_vit
from mifo.miniature.tokenizer import build_tokenizer
from mifo.world.scenes import SIZE

CHECKPOINTS = "checkpoints"
"""Folder in a run's own folder of what training goes on from, and of each part's averaged weights."""

FACTOR = "scaling_factor.pt"
"""File in that folder of the factor by which latents come to unit size."""

SHARD = "12MB"
"""Largest file of a saved model, so that the weights travel in small pieces."""

log = logging.getLogger(__name__)


def pretrain(
    settings: PretrainSettings, work: Path, weights: Path, device: torch.device, logger=True
) -> dict[str, bool]:
    """Train ``settings.parts`` in order, each going on from its checkpoint in ``work``, and write what is
    there as model folders into ``weights``: ``pipeline/`` and ``pipeline_mmdit/`` (diffusers), ``clip/``
    (open_clip), ``vit/`` (transformers), ``segmenter/``.

    Returns for each part whether it reached its number of steps; with ``settings.minutes`` a part may stop
    earlier. Raises MifoError for an unknown part or for one whose forerunner has not been made.
    """
    check_least("pretraining", settings, scenes=1)
    for part in settings.parts:
        check_known("pretraining.parts", part, PARTS)
        check_least(f"pretraining.{part}", getattr(settings, part), steps=1, batch_size=1)
    if settings.minutes is not None and not 0 < settings.minutes < inf:
        raise MifoError(f"pretraining.minutes={settings.minutes} must be above 0; null sets no limit.")
    if not 0 <= settings.words <= 1:
        raise MifoError(f"pretraining.words={settings.words} is no share; take 0 to 1.")
    if not (settings.parts or settings.after or settings.start):
        raise MifoError(f"pretraining.parts=[] trains nothing; choose from {', '.join(PARTS)}.")
    if settings.after:
        _take_over(Path(settings.after), work)
    if settings.start:
        _begin_with(WEIGHTS / "pipeline" if settings.start == "embedded" else Path(settings.start), work)
    if device.type == "cpu":
        log.warning("Without a GPU pretraining may take days; the denoiser takes half an hour of one H100.")
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer(work / "tokenizer")
    corpus = cache(lambda words: draw_corpus(settings.scenes, settings.seed, device, tokenizer, words=words))
    finished = {}
    for part in settings.parts:
        torch.manual_seed(settings.seed)
        began = time.perf_counter()
        if part == "autoencoder":
            module: Pretraining = AutoencoderPretraining(corpus(0.0), settings)
        elif part == "decoder":
            module = DecoderPretraining(corpus(0.0), _made(work, "autoencoder", build_autoencoder), settings)
        elif part == "text_encoder":
            module = TextEncoderPretraining(corpus(0.0), tokenizer, settings)
        elif part == "clip":
            module = ClipPretraining(corpus(0.0), tokenizer, settings)
        elif part == "vit":
            module = VitPretraining(settings, device)
        elif part == "segmenter":
            module = SegmenterPretraining(settings, device)
        else:
            vae = _made(work, "autoencoder", build_autoencoder).to(device)
            text_encoder = _made(work, "text_encoder", lambda: build_text_encoder(tokenizer))
            scenes = corpus(settings.words if part == "denoiser" else 0.0)
            latents, factor = encode_corpus(vae, scenes)
            if settings.start:
                factor = torch.load(work / FACTOR, weights_only=True)
            latents *= factor
            if part == "transformer":
                module = TransformerPretraining(scenes, latents, text_encoder, tokenizer, settings)
            else:
                unet = _made(work, "unet", build_unet) if settings.start else None
                empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
                module = DenoiserPretraining(scenes, latents, text_encoder, empty, settings, unet)
            torch.save(factor, work / FACTOR)
        finished[part] = fit(module, work / part, device, settings.minutes, logger)
        average = module.average.module.get_submodule("text_encoder" if part == "text_encoder" else "")
        torch.save(average.state_dict(), work / f"{part}.pt")
        print(f"{part}: {module.global_step} steps in {time.perf_counter() - began:.0f} s", flush=True)
    export(work, weights, tokenizer)
    return finished


def _take_over(run: Path, work: Path) -> None:
    """Copy the finished parts of another run to `work`, which keeps what it has."""
    finished = sorted((run / CHECKPOINTS).glob("*.pt"))
    if not finished:
        raise MifoError(
            f"pretraining.after={run}: no finished part lies in {run / CHECKPOINTS}; name a run's folder."
        )
    work.mkdir(parents=True, exist_ok=True)
    for file in finished:
        if not (work / file.name).exists():
            shutil.copy2(file, work)


def _begin_with(pipeline: Path, work: Path) -> None:
    """Put the parts of a pipeline of the miniature into `work`, which keeps what it has."""
    if not (pipeline / "unet").is_dir():
        raise MifoError(f"pretraining.start={pipeline} holds no unet/; name a folder pipeline/, or embedded.")
    work.mkdir(parents=True, exist_ok=True)
    made = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32, safety_checker=None)
    parts = {
        "autoencoder": made.vae.state_dict(),
        "text_encoder": made.text_encoder.state_dict(),
        "unet": made.unet.state_dict(),
        "scaling_factor": made.vae.config.scaling_factor,
    }
    for name, part in parts.items():
        if not (work / f"{name}.pt").exists():
            torch.save(part, work / f"{name}.pt")


def _made(work: Path, part: str, build):
    """The averaged weights of a part that has been trained."""
    file = work / f"{part}.pt"
    if not file.exists():
        raise MifoError(
            f"pretraining.parts: '{part}' must be made first; "
            "add it, or name the run that made it as pretraining.after."
        )
    model = build()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def _autoencoder(work: Path) -> AutoencoderKL:
    """The autoencoder with the decoder that learned last, and its factor."""
    decoded = "decoder" if (work / "decoder.pt").exists() else "autoencoder"
    vae: AutoencoderKL = _made(work, decoded, build_autoencoder)
    vae.register_to_config(scaling_factor=torch.load(work / FACTOR, weights_only=True))
    return vae


def export(work: Path, weights: Path, tokenizer) -> None:
    """Write every part that has been trained as an ordinary model folder in half precision."""
    if (work / "denoiser.pt").exists():
        painter = _made(work, "denoiser", lambda: Painter(build_text_encoder(tokenizer), build_unet()))
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(work),
            text_encoder=painter.text_encoder,
            tokenizer=tokenizer,
            unet=painter.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(torch.float16).save_pretrained(weights / "pipeline", max_shard_size=SHARD)
    if (work / "transformer.pt").exists():
        flow: FlowPainter = _made(work, "transformer", lambda: FlowPainter(tokenizer))
        vae = _autoencoder(work)
        vae.register_to_config(shift_factor=0.0)
        pipeline = StableDiffusion3Pipeline(
            transformer=flow.transformer,
            scheduler=build_flow_scheduler(),
            vae=vae,
            text_encoder=flow.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=flow.text_encoder_2,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.to(torch.float16).save_pretrained(weights / "pipeline_mmdit", max_shard_size=SHARD)
    if (work / "clip.pt").exists():
        clip = _made(work, "clip", lambda: build_clip(tokenizer))
        save_clip(clip, work / "tokenizer", weights / "clip", tokenizer)
    if (work / "vit.pt").exists():
        _made(work, "vit", build_vit).half().save_pretrained(weights / "vit")
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(weights / "vit")
    if (work / "segmenter.pt").exists():
        save_segmenter(_made(work, "segmenter", Segmenter), weights / "segmenter")
