"""Reading instances as people have them, class pictures, and what learning draws."""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from copy import copy
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from torch.utils._pytree import tree_leaves

from mifo.acceleration.settings import PerformanceSettings
from mifo.backbones.loading import load_model
from mifo.backbones.settings import ModelSettings
from mifo.data.class_pictures import class_prompts
from mifo.data.instances import InstanceSet, read_instances
from mifo.data.learning_data import LearningData, encoded_at_once
from mifo.data.mask_pyramid import MaskPyramid
from mifo.data.photo_folder import folder_digest
from mifo.data.settings import DrawSettings, InstancesSettings, PriorSettings
from mifo.errors import MifoError
from mifo.making.class_pictures import class_pictures
from mifo.method.losses.settings import PenaltySettings
from mifo.training.fit import check_learning, learn
from mifo.training.settings import LearningSettings
from mifo.world.vocabulary import BACKGROUNDS

WIDTH, HEIGHT = 40, 30


def square(left, top, side=8, width=WIDTH, height=HEIGHT):
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + side, left : left + side] = 255
    return mask


@pytest.fixture
def folder(tmp_path):
    """A picture whose colour tells the place, and two masks."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    pixels = np.stack([columns * 6, rows * 8, np.zeros_like(rows)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "img.png")
    Image.fromarray(square(2, 3)).save(tmp_path / "mask0.png")
    Image.fromarray(square(20, 10)).save(tmp_path / "mask1.png")
    return tmp_path


def read(folder, **settings):
    return read_instances(InstancesSettings("test", str(folder), **settings))


def test_masks_follow_their_numbers(folder):
    for number in range(2, 12):
        Image.fromarray(square(number, number)).save(folder / f"mask{number}.png")
    instances = read(folder)
    assert instances.tokens == tuple(f"<asset{i}>" for i in range(12))
    for number in range(2, 12):
        assert torch.equal(instances.masks[number] * 255, torch.from_numpy(square(number, number)).float())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "I;16", "P", "zeros and ones"])
def test_masks_of_every_format_mean_the_same(folder, mode):
    mask = square(2, 3)
    image = {
        "I;16": lambda: Image.fromarray(mask.astype(np.uint16) * 257),
        "zeros and ones": lambda: Image.fromarray(mask // 255),
    }.get(mode, lambda: Image.fromarray(mask).convert(mode))()
    image.save(folder / "mask0.png")
    assert torch.equal(read(folder).masks[0] * 255, torch.from_numpy(mask).float())


def soft(strength=200):
    """A mask with an edge of many values."""
    mask = square(2, 3) // 255 * strength
    mask[0] = np.linspace(0, 20, WIDTH)
    return mask


def test_soft_masks_keep_their_values(folder):
    expected = torch.from_numpy(soft()) / 255
    Image.fromarray(soft()).save(folder / "mask0.png")
    torch.testing.assert_close(read(folder).masks[0], expected)
    Image.fromarray(soft().astype(np.uint16) * 257).save(folder / "mask0.png")
    torch.testing.assert_close(read(folder).masks[0], expected)
    Image.fromarray(soft()).convert("RGB").save(folder / "mask0.png")
    torch.testing.assert_close(read(folder).masks[0], expected)


def labelled(colour):
    """A palette mask whose instance has the number 1 and `colour`."""
    image = Image.fromarray(square(2, 3) // 255, "L")
    image.putpalette([0, 0, 0, *colour])
    return image


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1, dark red", "1, green", "RGB", "RGB, green"])
def test_the_one_value_of_a_label_image_marks_the_instance(folder, mode):
    grey = square(2, 3) // 255 * 100
    image = {
        "L": lambda: Image.fromarray(grey),
        "LA": lambda: Image.fromarray(grey).convert("LA"),
        "I;16": lambda: Image.fromarray(grey.astype(np.uint16)),
        "1, dark red": lambda: labelled((128, 0, 0)),
        "1, green": lambda: labelled((0, 128, 0)),
        "RGB": lambda: Image.fromarray(grey).convert("RGB"),
        "RGB, green": lambda: labelled((0, 128, 0)).convert("RGB"),
    }[mode]()
    image.save(folder / "mask0.png")
    assert torch.equal(read(folder).masks[0] * 255, torch.from_numpy(square(2, 3)).float())


def test_a_palette_counts_by_its_colours(folder):
    image = Image.fromarray(1 - square(2, 3) // 255, "L")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(folder / "mask0.png")
    assert torch.equal(read(folder).masks[0] * 255, torch.from_numpy(square(2, 3)).float())
    Image.fromarray(soft()).convert("P").save(folder / "mask0.png")
    torch.testing.assert_close(read(folder).masks[0], torch.from_numpy(soft()) / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_the_alpha_of_a_cut_out_is_its_mask(folder, mode):
    alpha = Image.fromarray(square(2, 3))
    image, options = Image.open(folder / "img.png").convert("L" if mode == "LA" else "RGB"), {}
    if mode in ("RGBA", "LA"):
        image.putalpha(alpha)
    elif mode == "P":
        image, options = Image.fromarray(1 - square(2, 3) // 255, "L"), {"transparency": 1}
        image.putpalette([9, 9, 9, 200, 100, 0])
    else:
        image.paste((255, 0, 255), mask=Image.fromarray(255 - square(2, 3)))
        options = {"transparency": (255, 0, 255)}
    image.save(folder / "mask0.png", **options)
    assert torch.equal(read(folder).masks[0] * 255, torch.from_numpy(square(2, 3)).float())


def test_soft_alpha_keeps_its_values(folder):
    image = Image.open(folder / "img.png")
    image.putalpha(Image.fromarray(soft()))
    image.save(folder / "mask0.png")
    torch.testing.assert_close(read(folder).masks[0], torch.from_numpy(soft()) / 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "alpha", "one grey"])
def test_masks_nowhere_above_half_are_refused(folder, mode):
    faint = Image.fromarray(soft(127))
    if mode == "alpha":
        image = Image.open(folder / "img.png")
        image.putalpha(faint)
    elif mode == "I;16":
        image = Image.fromarray(soft(127).astype(np.uint16) * 257)
    elif mode == "one grey":
        image = Image.new("L", (WIDTH, HEIGHT), 127)
    else:
        image = faint.convert(mode)
    image.save(folder / "mask1.png")
    with pytest.raises(MifoError, match=r"mask1\.png reaches 0\.50 of 1.*white on black"):
        read(folder)


def test_a_mask_of_another_size_is_brought_to_the_picture(folder):
    Image.fromarray(square(4, 6, 16, 2 * WIDTH, 2 * HEIGHT)).save(folder / "mask0.png")
    mask = read(folder).masks[0]
    assert mask.shape == (HEIGHT, WIDTH)
    torch.testing.assert_close(mask.sum(), torch.tensor(64.0), rtol=0.1, atol=0)
    assert torch.equal(mask > 0.5, torch.from_numpy(square(2, 3)) > 0)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (42, HEIGHT), (WIDTH, HEIGHT + 1)])
def test_a_mask_of_other_proportions_is_refused(folder, size):
    Image.new("L", size, 255).save(folder / "mask1.png")
    expected = rf"mask1\.png is {size[0]}×{size[1]}, but img\.png is displayed at {WIDTH}×{HEIGHT}"
    with pytest.raises(MifoError, match=expected):
        read(folder)


def test_proportions_may_be_rounded(folder):
    Image.fromarray(square(20, 20, 80, 403, 300)).save(folder / "mask0.png")
    assert read(folder).masks.shape == (2, HEIGHT, WIDTH)


def test_orientation_of_the_camera_is_honoured(folder):
    image = Image.open(folder / "img.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(folder / "img.png", exif=exif)
    with pytest.raises(MifoError, match=rf"mask0\.png .* displayed at {HEIGHT}×{WIDTH}"):
        read(folder)
    for number, place in enumerate([(2, 3), (20, 25)]):
        mask = square(*place, width=HEIGHT, height=WIDTH)
        Image.fromarray(mask).save(folder / f"mask{number}.png")
    shown = read(folder).image
    assert shown.shape == (3, WIDTH, HEIGHT)
    assert torch.equal(shown, torch.from_numpy(np.array(image.rotate(-90, expand=True))).permute(2, 0, 1))


def test_grey_and_transparent_pictures(folder, caplog):
    grey = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 50
    Image.fromarray(grey).save(folder / "img.png")
    assert (read(folder).image.float() - torch.from_numpy(grey / 257)).abs().max() <= 0.5
    Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 0)).save(folder / "img.png")
    assert read(folder).image[:, 0, 0].tolist() == [255, 255, 255]
    assert "img.png is transparent in 100.0 % of its pixels" in caplog.text


def test_fitting_a_picture_that_is_not_square(folder):
    squashed = read(folder)
    image, masks = squashed.resized(20)
    assert image.shape == (3, 20, 20) and masks.shape == (2, 20, 20)
    assert masks[0].sum() == pytest.approx(64 * 20 / WIDTH * 20 / HEIGHT, rel=0.02)

    padded = read(folder, fit="pad")
    assert torch.equal(padded.image[:, 5 : 5 + HEIGHT], squashed.image)
    assert torch.equal(padded.masks[:, 5 : 5 + HEIGHT], squashed.masks) and padded.masks[:, :5].sum() == 0
    assert torch.equal(padded.image[:, 0], squashed.image[:, 0])

    cropped = read(folder, fit="crop")  # marked columns 2 … 27 have their middle at 15, which wants 0 … 29
    assert torch.equal(cropped.image, squashed.image[:, :, :HEIGHT])
    assert cropped.masks.sum() == squashed.masks.sum()


def test_masks_too_small_for_the_latents_of_the_model_that_reads_them_are_refused(folder):
    Image.open(folder / "img.png").resize((1600, 1200)).save(folder / "img.png")
    Image.fromarray(square(610, 610, 10, 1600, 1200)).save(folder / "mask1.png")

    def check(side: int) -> None:
        MaskPyramid.of(read(folder).resized(8 * side)[1], (), (side, side)).check()

    with pytest.raises(MifoError, match=r"<asset1> is too small to be learned.*64×64 latents"):
        check(64)
    check(128)  # finer latents, as those of Stable Diffusion XL, see it


def test_doubtful_masks_are_warned_of(folder, caplog):
    read(folder)
    assert not caplog.messages
    Image.fromarray(square(0, 0, WIDTH)).save(folder / "mask0.png")
    read(folder)
    covers, shares = caplog.messages
    assert "mask0.png covers 100 % of the picture" in covers
    assert "mask0.png and" in shares and "mask1.png share 100 % of the smaller one" in shares
    caplog.clear()
    Image.fromarray(square(18, 10)).save(folder / "mask0.png")  # 6 of 8 columns are those of the other one
    read(folder)
    assert len(caplog.messages) == 1 and "share 7" in caplog.messages[0]
    caplog.clear()
    Image.fromarray(255 - square(8, 2, 25)).save(folder / "mask0.png")  # inverted
    read(folder)
    assert "mask0.png covers 48 % of the picture and 100 % of its border" in caplog.text
    caplog.clear()
    Image.fromarray(square(15, 10)).save(folder / "mask0.png")
    read(folder)
    assert not caplog.messages


def test_a_folder_without_a_name_has_its_own(folder, monkeypatch):
    assert read(folder).name == "test"
    named = folder / "my_photo"
    named.symlink_to(folder)
    for name in ("local", "instances"):
        assert read_instances(InstancesSettings(name, str(named))).name == "my_photo"
    monkeypatch.chdir(folder)
    assert read_instances(InstancesSettings("local", ".")).name == folder.name


def test_the_digest_tells_what_a_folder_holds(folder):
    settings = InstancesSettings("test", str(folder))
    content = b"".join((folder / name).read_bytes() for name in ("img.png", "mask0.png", "mask1.png"))
    assert folder_digest(settings) == hashlib.sha256(content).hexdigest()[:12]
    (folder / "notes.txt").write_text("of no matter")
    assert folder_digest(settings) == hashlib.sha256(content).hexdigest()[:12]
    Image.fromarray(square(3, 3)).save(folder / "mask1.png")
    assert folder_digest(settings) != hashlib.sha256(content).hexdigest()[:12]
    (folder / "mask0.png").unlink()
    with pytest.raises(MifoError, match=r"mask0\.png is missing"):
        folder_digest(settings)
    assert folder_digest(InstancesSettings("scene", scene={"background": "at the beach"})) is None


def test_names_of_the_instances(folder):
    instances = read(folder, class_names=["car", "cat"], initializers=["car", None])
    assert instances.class_names == ("car", "cat") and instances.initializers == ("car", None)
    assert read(folder).initializers == (None, None) and read(folder).class_names is None
    with pytest.raises(MifoError, match="class_names names 1 instances, but there are 2"):
        read(folder, class_names=["car"])


def damage_missing(folder):
    (folder / "mask0.png").unlink()


def damage_all_missing(folder):
    damage_missing(folder)
    (folder / "mask1.png").unlink()


def damage_empty(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "mask1.png")


def damage_unreadable_mask(folder):
    (folder / "mask1.png").write_bytes(b"no picture")


def damage_cut_picture(folder):
    content = (folder / "img.png").read_bytes()
    (folder / "img.png").write_bytes(content[: len(content) // 2])


def damage_no_picture(folder):
    (folder / "img.png").unlink()


def damage_two_pictures(folder):
    Image.open(folder / "img.png").save(folder / "img.webp")


def damage_twice_the_number(folder):
    Image.fromarray(square(2, 3)).save(folder / "mask01.png")


def damage_twice_in_other_writing(folder):
    Image.fromarray(square(2, 3)).save(folder / "MASK_1.PNG")


def damage_far_number(folder):
    Image.fromarray(square(2, 3)).save(folder / "mask99999999999.png")


def damage_left_out(name):
    def damage(folder):
        (folder / name).write_bytes((folder / "mask1.png").read_bytes())

    return damage


def damage_upper_twice(folder):
    (folder / "IMG.PNG").write_bytes((folder / "img.png").read_bytes())


def damage_iphone(folder):
    (folder / "img.png").rename(folder / "img.HEIC")


def damage_camera_name(folder):
    (folder / "img.png").rename(folder / "IMG_1234.JPG")


def damage_pipe(folder):
    (folder / "mask1.png").unlink()
    os.mkfifo(folder / "mask1.png")


def damage_folder(folder):
    (folder / "img.png").unlink()
    (folder / "img.png").mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_missing, r"mask0\.png is missing"),
        (damage_all_missing, "holds no mask"),
        (damage_empty, r"mask1\.png marks nothing"),
        (damage_unreadable_mask, r"mask1\.png can not be read"),
        (damage_cut_picture, r"img\.png can not be read"),
        (damage_no_picture, "no image"),
        (damage_two_pictures, r"img\.png and img\.webp"),
        (damage_twice_the_number, "are both mask 1"),
        (damage_twice_in_other_writing, "are both mask 1"),
        (damage_far_number, r"mask2\.png is missing.*holds up to mask99999999999\.png"),
        *(
            (damage_left_out(name), rf"{re.escape(name)} looks like a mask.*save it as mask2\.png")
            for name in ("mask1 (1).png", "mask2.tif", "Mask.png", "car_mask.jpg")
        ),
        (damage_upper_twice, r"IMG\.PNG and img\.png"),
        (damage_iphone, r"img\.HEIC is not read.*PNG, JPEG or WebP"),
        (damage_camera_name, r"no image.*rename IMG_1234\.JPG"),
        (damage_pipe, r"mask1\.png is no regular file"),
        (damage_folder, r"img\.png cannot be read \(Is a directory\)"),
    ],
)
def test_damaged_folders_are_refused_by_name(folder, damage, sentence):
    damage(folder)
    with pytest.raises(MifoError, match=sentence):
        read(folder)


@pytest.mark.parametrize("name", ["MASK1.PNG", "mask_1.png", "Mask-1.Png", "mask 1.webp", "mask1.jpg"])
def test_masks_are_found_by_the_names_of_exports(folder, name):
    mask = Image.open(folder / "mask1.png")
    (folder / "mask1.png").unlink()
    mask.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    (folder / "img.png").rename(folder / "IMG.PNG")
    (folder / "._mask7.png").write_bytes(b"of macOS")
    found = read(folder).masks
    torch.testing.assert_close(found[1] * 255, torch.from_numpy(square(20, 10)).float(), rtol=0, atol=60)
    assert torch.equal(found[1] > 0.5, torch.from_numpy(square(20, 10)) > 0) and len(found) == 2


def test_impossible_settings_are_refused(folder):
    with pytest.raises(MifoError, match=r"instances\.folder=.*img\.png is a file, not a folder"):
        read(folder / "img.png")
    with pytest.raises(MifoError, match="neither a folder nor a scene"):
        read_instances(InstancesSettings())
    with pytest.raises(MifoError, match="take instances=local"):
        read(folder, scene={"background": "at the beach"})
    with pytest.raises(MifoError, match="is not a folder"):
        read(folder / "nowhere")
    with pytest.raises(MifoError, match=r"instances\.fit=zoom"):
        read(folder, fit="zoom")
    Image.fromarray(square(0, 0, 4)).save(folder / "mask0.png")
    Image.fromarray(square(34, 0, 4)).save(folder / "mask1.png")
    with pytest.raises(MifoError, match=r"mask0\.png lies outside the square"):
        read(folder, fit="crop")


def test_a_scene_of_the_miniature():
    things = [{"thing": "car", "colour": "red"}, {"thing": "cup", "colour": "blue"}]
    scene = {"things": things, "background": BACKGROUNDS[0]}
    instances = read_instances(InstancesSettings("scene", scene=scene))
    assert instances.image.dtype == torch.uint8 and instances.image.shape[1:] == instances.masks.shape[1:]
    assert instances.class_names == ("car", "cup") and len(instances.masks) == 2
    red, _, blue = (instances.image * (instances.masks[0] > 0.5)).flatten(1).float().sum(1)
    assert red > blue
    with pytest.raises(MifoError, match="colur"):
        read_instances(
            InstancesSettings("scene", scene=scene | {"things": [{"thing": "car", "colur": "red"}]})
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(ModelSettings("tiny", str(tiny_pipeline(tmp_path_factory.mktemp("pipeline")))))
    model.add_words(["<asset0>", "<asset1>", "<asset2>"])
    return model


@pytest.fixture
def instances():
    masks = torch.zeros(3, 32, 32)
    for i in range(3):
        masks[i, 2 + 8 * i : 10 + 8 * i, 3:12] = (i + 1) / 3
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = ("<asset0>", "<asset1>", "<asset2>")
    return InstanceSet("three", image, masks, ("car", "owl", "car"), (None, None, None), tokens)


SIZES = {(32, 32), (8, 8)}  # that of the picture, whose masks stay as they are, and one of attention maps


def drawn(
    model,
    instances,
    with_prior=False,
    batch_size=1,
    seed=0,
    stream=0,
    steps=600,
    trainer=None,
    performance=None,
    **settings,
):
    draw, pictures = DrawSettings(**settings), None
    if with_prior:
        prompts = class_prompts(instances, draw.prior)
        pictures = partial(class_pictures, model, prompts, draw.prior, seed, performance)
    data = LearningData(model, instances, draw, steps, batch_size, SIZES, seed, stream, pictures, performance)
    data.trainer = trainer
    data.setup("fit")
    return data


def test_draws_are_what_the_method_says(model, instances):
    data = drawn(model, instances)
    sizes, orders, flips, times, samples = Counter(), Counter(), Counter(), [], []
    for step in range(600):
        batch = data.draw(step)
        inputs, masks = batch.inputs, batch.inputs.masks[32, 32][0]
        valid = inputs.valid[0].bool()
        size = int(valid.sum())
        assert valid.tolist() == [True] * size + [False] * (3 - size)
        ids = batch.ids[0, 0]
        words = model.tokenizer.convert_ids_to_tokens(ids[inputs.word_positions[0][valid]].tolist())
        order = [int(word[6]) for word in words]
        assert torch.equal(batch.ids, model.tokenize(["a photo of " + " and ".join(words)]))
        assert len(set(order)) == size
        flip = torch.equal(masks[0], instances.masks[order[0]].flip(-1))
        for mask, instance in zip(masks, order, strict=False):
            assert torch.equal(
                mask, instances.masks[instance].flip(-1) if flip else instances.masks[instance]
            )
        assert masks[size:].sum() == 0
        nearest = torch.nn.functional.interpolate(masks[None], (16, 16))  # of the latents
        assert torch.equal(inputs.latent_masks, nearest)
        small = torch.nn.functional.interpolate(masks[None], (8, 8), mode="bilinear")
        torch.testing.assert_close(inputs.masks[8, 8], small)
        sizes[size] += 1
        orders[tuple(order)] += 1
        flips[flip] += 1
        times.append(int(inputs.times[0]))
        samples.append((inputs.latents[0] - data.latents[0][int(flip)]) / data.latents[1][int(flip)])
    assert all(150 < sizes[size] < 250 for size in (1, 2, 3))
    assert len(orders) == 15
    assert 240 < flips[True] < 360
    assert 0 <= min(times) < 20 and 980 < max(times) < 1000 and 460 < np.mean(times) < 540
    sample = torch.stack(samples)
    assert abs(float(sample.mean())) < 0.01 and abs(float(sample.std()) - 1) < 0.01


def test_latents_are_of_the_picture_and_of_its_mirror_image(model, instances):
    data = drawn(model, instances)
    image, _ = instances.resized(32)
    for flip, picture in enumerate((image, image.flip(-1))):
        mean, deviation = model.encode_images(picture[None])
        torch.testing.assert_close(data.latents[0][flip], mean[0])
        torch.testing.assert_close(data.latents[1][flip], deviation[0])


def test_pictures_are_encoded_as_they_are_taken(model):
    images, seen = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []

    def told(i):
        seen.append(i)
        return images[i]

    found = model.encode_images(map(told, range(5)), at_once=2)
    assert seen == [*range(5)]
    for ours, theirs in zip(found, model.encode_images(images, at_once=5), strict=True):
        torch.testing.assert_close(ours, theirs)


def fields(batch):
    return tree_leaves(batch)


def test_a_draw_depends_on_its_step_alone(model, instances):
    data, again = drawn(model, instances, batch_size=2), drawn(model, instances, batch_size=2)
    for _ in range(3):
        again.draw(1)
    assert all(map(torch.equal, fields(data.draw(7)), fields(again.draw(7))))
    noise = [data.draw(7).inputs.noise, data.draw(8).inputs.noise]
    noise += [
        drawn(model, instances, batch_size=2, **other).draw(7).inputs.noise
        for other in ({"seed": 1}, {"stream": 1})
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(noise) for b in noise[:i])


def test_the_pyramid_holds_masks_mirrored_masks_and_none():
    masks = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(0))
    pyramid = MaskPyramid.of(masks, {(4, 6), (8, 12)}, (2, 3))
    assert pyramid.at.keys() == {(4, 6), (8, 12)}
    plain, latent = pyramid.rows(0, [1, 2, 0])
    assert torch.equal(plain[8, 12], torch.stack([masks[1], torch.zeros(8, 12), masks[0]]))
    assert torch.equal(latent[0], masks[1, ::4, ::4]) and latent[1].sum() == 0
    mirrored, _ = pyramid.rows(1, [1])
    torch.testing.assert_close(mirrored[4, 6][0], plain[4, 6][0].flip(-1))


def test_a_mask_between_the_latents_of_the_model_is_refused(model, instances):
    masks = instances.masks.clone()
    masks[1] = 0
    masks[1, 5, 7] = 1  # latents are those of even pixels
    with pytest.raises(MifoError, match=r"<asset1> .* marks none of the 16×16 latents"):
        drawn(model, dataclasses.replace(instances, masks=masks))


def test_without_union_sampling_and_flips(model, instances):
    data = drawn(model, instances, union_sampling=False, flip_probability=0.0)
    for step in range(20):
        inputs = data.draw(step).inputs
        assert torch.equal(inputs.masks[32, 32][0], instances.masks) and inputs.valid.sum() == 3
    with pytest.raises(MifoError, match="must name each instance once"):
        drawn(model, instances, template="a photo").draw(0)


def test_class_samples_come_first_with_their_own_prompt(model, instances, tmp_path):
    prior = PriorSettings(pictures=3, steps=2, cache=str(tmp_path))
    data = drawn(model, instances, with_prior=True, batch_size=2, prior=prior)
    prompts = Counter()
    for step in range(40):
        batch = data.draw(step)
        inputs = batch.inputs
        assert inputs.latents.shape == inputs.noise.shape == (4, 4, 16, 16)
        assert inputs.times.shape == (4,) and inputs.latent_masks.shape == (2, 3, 16, 16)
        assert {size: each.shape for size, each in inputs.masks.items()} == {
            size: (2, 3, *size) for size in SIZES
        }
        prompts.update(model.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.ids[:2, 0])
        assert all("<asset" in model.tokenizer.decode(ids) for ids in batch.ids[2:, 0])
    assert set(prompts) == {"a photo of a car", "a photo of an owl"}
    assert prompts["a photo of a car"] > prompts["a photo of an owl"]  # two of three pictures


@pytest.fixture
def own_pictures(tmp_path):
    """Thirty class pictures of noise."""
    generator = np.random.default_rng(0)
    for i in range(30):
        pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return PriorSettings(folder=str(tmp_path), prompts=["a car"])


@pytest.fixture
def encoded(model, monkeypatch):
    """How many pictures the VAE was given at once, call by call."""
    sizes, encode = [], model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda images: sizes.append(len(images)) or encode(images))
    return sizes


def replayed(instances, latents, step):
    """Class picture, mirror, latents, noise and times of a step of one sample, drawn number by number.

    `latents`: mean and deviation (2, B, 4, h, w) of all class pictures and their mirror images.
    """
    entropy = np.random.SeedSequence([0, 0, 0, step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(entropy[0]))
    number = len(instances.tokens)
    torch.randint(number, (1,), generator=generator)
    torch.randperm(number, generator=generator)
    torch.rand((), generator=generator)
    picture = int(torch.randint(latents[0].shape[1], (1,), generator=generator))
    mirror = int(torch.rand((), generator=generator) < 0.5)
    sample, noise = torch.randn(2, 2, *latents[0].shape[2:], generator=generator)
    times = torch.randint(1000, (2,), generator=generator)
    mean, deviation = (each[mirror, picture] for each in latents)
    return (picture, mirror), mean + deviation * sample[0], noise, times


def test_only_what_is_drawn_of_the_class_pictures_is_encoded(model, instances, own_pictures, encoded):
    pictures, _ = taken(model, ["a car"], own_pictures, seed=0)
    latents = [
        torch.stack(ways)
        for ways in zip(*(model.encode_images(each) for each in (pictures, pictures.flip(-1))), strict=True)
    ]
    encoded.clear()
    data = drawn(model, instances, True, steps=20, prior=own_pictures)
    assert encoded[0] == 2 and set(encoded[1:-1]) <= {16} and encoded[-1] <= 16
    found = set()
    for step in range(21):  # the trainer draws one ahead
        pair, latent, noise, times = replayed(instances, latents, step)
        found.add(pair)
        inputs = data.draw(step).inputs
        torch.testing.assert_close(inputs.latents[0], latent, rtol=0, atol=1e-5)
        assert torch.equal(inputs.noise, noise) and torch.equal(inputs.times, times)
    assert sum(encoded[1:]) == len(found) < 60


def test_where_memory_is_short_class_pictures_are_encoded_one_by_one(model, instances, own_pictures, encoded):
    short = PerformanceSettings(learning_precision="float32", gradient_checkpointing=True)
    drawn(model, instances, True, steps=20, prior=own_pictures, performance=short)
    assert len(encoded) > 10 and set(encoded[1:]) == {1}


def test_steps_beyond_those_of_the_stage_are_drawn_alike(model, instances, own_pictures, encoded):
    few, many = (drawn(model, instances, True, steps=each, prior=own_pictures) for each in (3, 60))
    encoded.clear()
    for step in range(60):
        for ours, theirs in zip(fields(few.draw(step)), fields(many.draw(step)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert set(encoded) == {1}


def test_a_run_resumed_in_the_middle_draws_the_same(model, instances, own_pictures):
    trainer = SimpleNamespace(global_step=0)
    whole, resumed = (
        drawn(model, instances, True, steps=9, trainer=copy(trainer), prior=own_pictures) for _ in range(2)
    )
    resumed.trainer.global_step = 4
    batches = list(islice(whole.train_dataloader(), 9))
    for before, after in zip(batches[4:], resumed.train_dataloader(), strict=False):
        assert all(map(torch.equal, fields(before), fields(after)))


def taken(*args, **kwargs):
    """All class pictures in one tensor, and their prompts."""
    pictures, told = class_pictures(*args, **kwargs)
    return torch.stack([*pictures.read(range(len(told)))]), told


def test_class_pictures_are_made_once(model, instances, tmp_path, monkeypatch):
    settings = PriorSettings(pictures=3, steps=2, cache=str(tmp_path), batch_size=2)
    prompts = class_prompts(instances, settings)
    assert prompts == ["a photo of a car", "a photo of an owl"]
    pictures, told = taken(model, prompts, settings, seed=0)
    assert pictures.shape == (3, 3, 32, 32) and told == [prompts[0], prompts[0], prompts[1]]
    more, _ = taken(model, prompts[:1], dataclasses.replace(settings, pictures=4), seed=0)
    assert torch.equal(more[:2], pictures[:2])
    made_alone = dataclasses.replace(settings, cache=str(tmp_path / "other"), pictures=4, batch_size=1)
    alone, _ = taken(model, prompts[:1], made_alone, seed=0)
    assert (alone - more).abs().max() <= 1 / 255 + 1e-6

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr("mifo.making.class_pictures.Sampler", never)
    assert torch.equal(taken(model, prompts, settings, seed=0)[0], pictures)
    with pytest.raises(AssertionError, match="made again"):
        class_pictures(model, prompts, settings, seed=1)


def test_damaged_class_pictures_are_made_again(model, tmp_path):
    settings = PriorSettings(pictures=2, steps=2, cache=str(tmp_path))
    pictures, _ = taken(model, ["a photo of a car"], settings, seed=0)
    first, second = sorted(tmp_path.rglob("*.png"))
    first.write_bytes(first.read_bytes()[:-300])
    second.write_bytes(b"")
    assert torch.equal(taken(model, ["a photo of a car"], settings, seed=0)[0], pictures)


def test_a_cache_that_can_not_be_written_is_refused_before_anything_is_learned(
    model, instances, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    settings = LearningSettings(
        prior=PriorSettings(pictures=2, steps=2, cache=str(tmp_path / "file" / "cache"))
    )
    monkeypatch.setattr(type(model), "add_words", None)  # the first step of learning
    with pytest.raises(MifoError, match=r"file/cache.* can not be written .*learning\.prior\.cache=PATH"):
        learn(copy(model), instances, settings, PenaltySettings(), tmp_path / "run")


def test_what_a_killed_run_left_among_class_pictures_is_removed(model, tmp_path):
    settings = PriorSettings(pictures=1, steps=1, cache=str(tmp_path))
    (picture,) = class_pictures(model, ["a photo of a car"], settings, seed=1)[0].files
    killed, writing = picture.with_suffix(".7.png"), picture.with_suffix(".8.png")
    for file in (killed, writing):
        file.write_bytes(b"half")
    os.utime(killed, (0, 0))
    picture.unlink()
    class_pictures(model, ["a photo of a car"], settings, seed=1)
    assert sorted(picture.parent.iterdir()) == sorted([picture, writing])


def test_class_pictures_are_read_as_photographs_are(model, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 8))
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(np.full((32, 32), 51400, np.uint16)).save(tmp_path / "b.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "c.PNG")
    (tmp_path / "._a.jpg").write_bytes(b"of macOS")
    pictures, _ = taken(model, ["a car"], PriorSettings(folder=str(tmp_path), prompts=["a car"]), seed=0)
    assert len(pictures) == 3
    assert pictures[0, :, 0].min() > 0.9 and pictures[0, :, -1].max() < 0.1
    torch.testing.assert_close(pictures[1], torch.full((3, 32, 32), 200 / 255))
    assert pictures[2].min() == 1 and "c.PNG is transparent in 100.0 % of its pixels" in caplog.text
    (tmp_path / "d.webp").write_bytes(b"no picture")
    settings = LearningSettings(prior=PriorSettings(folder=str(tmp_path)))
    with pytest.raises(MifoError, match=r"d\.webp can not be read"):
        check_learning(settings)
    settings.prior.folder = str(tmp_path / "b.png")
    with pytest.raises(MifoError, match=r"learning\.prior\.folder=.*b\.png is a file, not a folder"):
        check_learning(settings)


def test_class_pictures_of_ones_own(model, folder):
    own = PriorSettings(folder=str(folder), prompts=["a car"])
    pictures, told = taken(model, ["a car"], own, seed=0)
    assert pictures.shape == (3, 3, 32, 32) and told == ["a car"] * 3
    (folder / "empty").mkdir()
    with pytest.raises(MifoError, match="holds no picture"):
        class_pictures(model, ["a car"], PriorSettings(folder=str(folder / "empty")), seed=0)


def test_class_pictures_of_ones_own_need_one_prompt(folder, instances):
    own = PriorSettings(folder=str(folder))
    with pytest.raises(MifoError, match="does not say which pictures show a car and which an owl"):
        class_prompts(instances, own)
    assert class_prompts(instances, dataclasses.replace(own, prompts=["a photo of a thing"])) == [
        "a photo of a thing"
    ]
    alike = dataclasses.replace(instances, class_names=("car", "car"))
    assert class_prompts(alike, own) == ["a photo of a car"]


def test_large_class_pictures_are_encoded_in_the_memory_of_sixteen_of_512() -> None:
    assert [encoded_at_once(size, None) for size in (128, 512, 768, 1024, 4096)] == [16, 16, 7, 4, 1]
    assert encoded_at_once(128, PerformanceSettings(gradient_checkpointing=True)) == 1
