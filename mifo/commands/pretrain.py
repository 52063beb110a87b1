"""`mifo pretrain`: the miniature's weights, part by part."""

from pathlib import Path

from mifo.commands.setup import open_loggers, prepare
from mifo.config.jobs import claim_folder
from mifo.config.schema import PretrainTaskSettings
from mifo.miniature.pretraining.run import CHECKPOINTS
from mifo.miniature.pretraining.run import pretrain as make_weights


def pretrain(settings: PretrainTaskSettings) -> Path:
    """Train the named parts and write them as model folders; returns the folder of the weights."""
    device, folder = prepare(settings), claim_folder(settings)
    weights = folder / "weights"
    with open_loggers(settings) as loggers:
        finished = make_weights(settings.pretraining, folder / CHECKPOINTS, weights, device, loggers)
    for part, done in finished.items():
        print(f"{part}: {'finished' if done else 'stopped early; go on with resume=' + str(folder)}")
    print(f"weights: {weights}")
    return weights
