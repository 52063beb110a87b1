"""`mifo pretrain`: the miniature's weights, part by part."""

import logging
from pathlib import Path

import torch

from mifo.commands.setup import open_loggers, prepare
from mifo.config.jobs import claim_folder
from mifo.config.schema import PretrainTaskSettings
from mifo.miniature.pretraining.run import CHECKPOINTS
from mifo.miniature.pretraining.run import pretrain as make_weights

log = logging.getLogger(__name__)


def pretrain(settings: PretrainTaskSettings) -> Path:
    """Train the named parts and write them as model folders; returns the folder of the weights."""
    prepare(settings)
    if not torch.cuda.is_available():
        log.warning("Without a GPU pretraining may take days; the denoiser takes half an hour of one H100.")
    folder = claim_folder(settings)
    weights = folder / "weights"
    with open_loggers(settings) as loggers:
        finished = make_weights(settings.pretraining, folder / CHECKPOINTS, weights, loggers)
    for part, done in finished.items():
        print(f"{part}: {'finished' if done else 'stopped early; go on with resume=' + str(folder)}")
    print(f"weights: {weights}")
    return weights
