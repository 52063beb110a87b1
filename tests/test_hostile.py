"""Folders that somebody else sends, and files that nobody of MIFO's wrote: each ends in a sentence."""

import os

import pytest
from lightning.pytorch.callbacks import Callback
from PIL import Image
from terms import penalty
from tiny import two_instances

from mifo.backbones.loading import load_model, load_outline
from mifo.backbones.settings import ModelSettings
from mifo.commands.evaluate import recorded_instances
from mifo.data.class_pictures import own_picture_files
from mifo.errors import MifoError
from mifo.files import read_yaml
from mifo.training.checkpoints import WholeCheckpoints
from mifo.training.fit import learn
from mifo.training.settings import LearningSettings, StageSettings


class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        raise RuntimeError("stopped")


def test_a_checkpoint_with_a_right_checksum_and_odd_states_is_refused(source, tmp_path):
    stage = StageSettings(steps=2, checkpoint_every=1)
    settings = LearningSettings(semantic=stage, finetuning=StageSettings(steps=0))

    def run(*callbacks):
        options = {"trainer": {"accelerator": "cpu", "enable_progress_bar": False}, "callbacks": callbacks}
        model = load_model(ModelSettings("tiny", source))
        learn(model, two_instances(), settings, penalty(reward_steps=1), tmp_path, **options)

    class Late(Stop):  # after the first checkpoint
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step:
                raise RuntimeError("stopped")

        def on_train_batch_end(self, trainer, *args):
            pass

    with pytest.raises(RuntimeError, match="stopped"):
        run(Late())
    file = tmp_path / "checkpoints" / "semantic" / "last.ckpt"
    good, io = file.read_bytes(), WholeCheckpoints()
    for odd in (
        {"loops": "x"},
        {"loops": {"fit_loop": {"state_dict": 3}}},
        {"callbacks": [1]},
        {"lr_schedulers": [{"last_epoch": "x"}] * 3},
        {"pytorch-lightning_version": "x"},
    ):
        file.write_bytes(good)
        io.save_checkpoint(io.load_checkpoint(file) | odd, file)
        file.with_name("previous.ckpt").unlink()
        try:
            run(Stop())
        except RuntimeError as error:  # Lightning takes it: learning goes on to its next step
            assert str(error) == "stopped"
        except MifoError as error:
            assert "last.ckpt is damaged" in str(error) and "delete the folder" in str(error)
        else:
            raise AssertionError(f"{odd} was overlooked")
    file.write_bytes(good)
    with pytest.raises(RuntimeError, match="stopped"):  # no fault of the checkpoint
        run(Stop())


@pytest.mark.parametrize("arguments", [{"accelerator": None}, {"max_time": "x"}, {"limit_train_batches": []}])
def test_a_trainer_of_odd_values_is_told(source, tmp_path, arguments):
    stage = StageSettings(steps=1)
    settings = LearningSettings(semantic=stage, finetuning=StageSettings(steps=0))
    model = load_model(ModelSettings("tiny", source))
    with pytest.raises(MifoError, match="trainer does not take its arguments"):
        learn(model, two_instances(), settings, penalty(reward_steps=1), tmp_path, trainer=arguments)


def test_own_class_pictures_are_read_whole_before_learning(tmp_path):
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(tmp_path / "cut.png")
    assert own_picture_files(str(tmp_path))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(MifoError, match=r"cut\.png can not be read"):
        own_picture_files(str(tmp_path))


def test_a_folder_with_the_name_of_a_checkpoint_is_told(tmp_path):
    checkpoint = {"state_dict": {}, "optimizer_states": []}
    file = tmp_path / "run" / "checkpoints" / "semantic" / "last.ckpt"
    for _ in range(2):
        WholeCheckpoints().save_checkpoint(checkpoint, file)
    file.unlink()
    file.mkdir()
    with pytest.raises(MifoError, match=r"last\.ckpt cannot be replaced"):
        WholeCheckpoints().load_checkpoint(file)


def test_a_broken_interpolation_is_told_with_its_file(tmp_path):
    (tmp_path / "a.yaml").write_text("key: ${oops")
    with pytest.raises(MifoError, match=r"a\.yaml is damaged: it is not YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_a_record_of_instances_reads_nothing_of_the_environment(tmp_path):
    (tmp_path / "instances.yaml").write_text("name: '${oc.env:HOME}'\nfolder: x\n")
    with pytest.raises(MifoError, match=r"instances\.yaml holds \$\{…\}"):
        recorded_instances(tmp_path)


def test_a_pipe_in_a_model_is_not_waited_for(source, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for part in os.listdir(source):
        (folder / part).symlink_to(os.path.join(source, part))
    (folder / "tokenizer").unlink()
    (folder / "tokenizer").mkdir()
    os.mkfifo(folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(MifoError, match=r"tokenizer\.json is no regular file"):
        load_outline(ModelSettings("tiny", str(folder)))
