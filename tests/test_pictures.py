"""The one reader of pictures: what a viewer shows, or one sentence."""

import os
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mifo.data.masks import read_mask
from mifo.data.pictures import check_picture, is_whole, read_picture
from mifo.errors import MifoError

FIELD = Path(__file__).parent / "field"
NOISE = np.random.default_rng(0).integers(256, size=(24, 32, 3), dtype=np.uint8)


def stored(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def shown(file: Path) -> np.ndarray:
    return np.asarray(read_picture(file))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P"])
def test_pictures_of_every_mode_keep_their_colours(tmp_path, mode):
    image = Image.fromarray(NOISE).convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(shown(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_a_link_to_a_picture_is_followed(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert np.array_equal(shown(tmp_path / "b.png"), NOISE)


def test_colours_come_in_srgb():
    """Display P3: the field's picture holds three sRGB colours."""
    colours = np.unique(shown(FIELD / "display_p3.png").reshape(-1, 3), axis=0)
    assert np.abs(colours - np.array([[30, 200, 40], [90, 120, 200], [220, 30, 30]])).max() <= 2


def test_srgb_by_its_profile_keeps_every_bit(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(shown(tmp_path / "a.png"), NOISE)
    Image.fromarray(NOISE[..., 0]).save(tmp_path / "grey.png", icc_profile=profile)
    assert np.array_equal(shown(tmp_path / "grey.png"), NOISE[..., :1].repeat(3, -1))


@pytest.mark.parametrize("profile", [b"no profile", None])
def test_a_profile_that_can_not_be_used_is_warned_of(tmp_path, caplog, profile):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile or lab)
    assert np.array_equal(shown(tmp_path / "a.png"), NOISE)
    assert "a.png has a colour profile that can not be used" in caplog.text


def test_print_colours_are_read(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg")
    assert np.abs(shown(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() <= 3


def test_transparent_pixels_are_white_and_warned_of(tmp_path, caplog):
    image = Image.new("RGBA", (10, 10), (255, 0, 255, 0))
    image.paste((10, 20, 30, 255), (0, 0, 10, 4))
    image.paste((0, 0, 0, 128), (0, 4, 10, 5))
    image.save(tmp_path / "a.webp", lossless=True, exact=True)
    pixels = shown(tmp_path / "a.webp")
    assert [pixels[row, 0].tolist() for row in (0, 4, 9)] == [[10, 20, 30], [127] * 3, [255] * 3]
    assert caplog.messages == [
        f"{tmp_path / 'a.webp'} is transparent in 60.0 % of its pixels, which are read over white"
    ]


def test_grey_of_sixteen_bits_is_scaled(tmp_path, caplog):
    levels = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.abs(shown(tmp_path / "a.png")[..., 0] - levels / 257).max() <= 0.5
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=5000)
    assert shown(tmp_path / "a.png")[levels == 5000].tolist() == [[255] * 3]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pictures_and_masks_stand_upright(tmp_path, form):
    image = Image.new("L", (40, 24))
    image.paste(255, (0, 0, 16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.convert("RGB").save(tmp_path / "a.png", form, exif=exif)
    for pixels in (shown(tmp_path / "a.png")[..., 0] / 255, read_mask(tmp_path / "a.png")):
        assert pixels.shape == (40, 24)
        assert np.abs(pixels[:14] - 1).max() < 0.1 and pixels[18:].max() < 0.1


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_several_frames_the_first_is_read(tmp_path, caplog, form):
    first, second = Image.fromarray(NOISE), Image.new("RGB", (32, 24))
    first.save(tmp_path / "a.png", form, save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(shown(tmp_path / "a.png"), NOISE)
    assert caplog.messages == [f"{tmp_path / 'a.png'} holds 2 frames, of which the first is read"]


def test_previews_in_a_photograph_are_no_frames(tmp_path, caplog):
    Image.fromarray(NOISE).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert shown(tmp_path / "a.jpg").shape == (24, 32, 3) and not caplog.messages


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is that large, of a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (png_of(10_000, 10_000), "more than 89 megapixels.*make it smaller"),
        (png_of(60_000, 60_000), "more than 89 megapixels.*make it smaller"),
        (png_of(0, 10), "can not be read"),
        (b"", "another format, or damaged"),
        (stored(Image.fromarray(NOISE))[:900], "can not be read.*save it anew"),
        (stored(Image.fromarray(NOISE), "JPEG")[:900], "can not be read.*save it anew"),
        (stored(Image.fromarray(NOISE), "WEBP")[:100], "can not be read.*save it anew"),
        (stored(Image.fromarray(NOISE), exif=b"Exif\0\0no EXIF"), "can not be read.*save it anew"),
        (stored(Image.fromarray(NOISE), "DDS"), "another format, or damaged"),
        (stored(Image.fromarray(NOISE), "GIF"), "another format, or damaged"),
    ],
)
def test_what_is_no_picture_is_refused_at_once(tmp_path, content, sentence):
    (tmp_path / "a.png").write_bytes(content)
    begun = time.monotonic()
    for read in (read_picture, read_mask):
        with pytest.raises(MifoError, match=rf"a\.png.*{sentence}") as refusal:
            read(tmp_path / "a.png")
        assert "\n" not in str(refusal.value)
    assert time.monotonic() - begun < 2


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    for name in ("pipe", "link", "device", "folder", "nowhere", "missing"):
        with pytest.raises(MifoError, match=rf"{name}\.png"):
            check_picture(tmp_path / f"{name}.png")


def test_damage_anywhere_ends_in_a_sentence(tmp_path):
    generator = np.random.default_rng(0)
    alpha = Image.fromarray(NOISE)
    alpha.putalpha(Image.fromarray(NOISE[..., 0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [
        (FIELD / "display_p3.png").read_bytes(),
        *(stored(Image.fromarray(NOISE), form, exif=exif) for form in ("PNG", "JPEG", "WEBP")),
        *(stored(alpha, form) for form in ("PNG", "WEBP")),
        stored(Image.fromarray(NOISE).convert("P"), transparency=3),
    ]
    refused = 0
    for number in range(300):
        content = bytearray(contents[number % len(contents)])
        for place in generator.integers(len(content), size=1 + number % 4):
            content[place] = generator.integers(256)
        (tmp_path / "a.png").write_bytes(content[: generator.integers(1, len(content) + 1)])
        for read in (read_picture, read_mask):
            try:
                read(tmp_path / "a.png")
            except MifoError as error:
                assert "a.png" in str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 100


def test_one_bit_among_the_pixels_of_a_png_is_noticed(tmp_path):
    """Of a smooth picture, whose few bytes decode to other colours without an error."""
    levels = np.indices((128, 128)).sum(0).astype(np.uint8)
    content, file = stored(Image.fromarray(levels)), tmp_path / "a.png"
    first = content.index(b"IDAT") + 4
    for place in range(first, len(content) - 16):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(MifoError, match=r"a\.png can not be read"):
            read_picture(file)


def test_a_half_picture_of_ones_own_is_not_whole(tmp_path):
    content = stored(Image.fromarray(NOISE[:, :24]))
    (tmp_path / "a.png").write_bytes(content)
    assert is_whole(tmp_path / "a.png", 24)
    assert not is_whole(tmp_path / "a.png", 32) and not is_whole(tmp_path / "missing.png", 24)
    for damaged in (b"", content[:-200], content[:-5], content[:500] + b"x" + content[501:]):
        (tmp_path / "a.png").write_bytes(damaged)
        assert not is_whole(tmp_path / "a.png", 24)


# label images and soft masks


def disc(side: int, radius: float = 0.3, soft: float = 1.0) -> np.ndarray:
    """(side, side) in [0, 1]: a disc with an edge of `soft` pixels, as antialiasing draws one."""
    rows, columns = np.indices((side, side)) / side - 0.5
    return np.clip((radius - np.hypot(rows, columns)) * side / soft + 0.5, 0, 1)


@pytest.mark.parametrize(
    "name", ["voc_void", "voc_palette", "two_labels", "rgb_labels", "antialiased", "jpeg"]
)
def test_a_mask_of_several_labels_is_refused(tmp_path, name):
    labels = np.zeros((300, 400), np.uint8)
    labels[40:100, 50:120], labels[150:250, 200:320] = 127, 254
    file = tmp_path / f"{name}.png"
    if name.startswith("voc"):
        file = FIELD / f"{name}.png"
    elif name == "rgb_labels":
        Image.fromarray(np.stack([labels * (labels < 200), labels * (labels > 200), 0 * labels], -1)).save(
            file
        )
    elif name == "antialiased":
        Image.fromarray(labels).resize((797, 601), Image.Resampling.BICUBIC).save(file)
    else:
        Image.fromarray(labels).save(file, **({"format": "JPEG"} if name == "jpeg" else {}))
    with pytest.raises(MifoError, match=rf"{name}\.png has several flat values.*mask0\.png, mask1\.png"):
        read_mask(file)


@pytest.mark.parametrize("side", [16, 64, 200, 512, 1500])
@pytest.mark.parametrize("soft", [1.0, 2.0, 9.0, 60.0])
def test_soft_edges_are_no_labels(tmp_path, side, soft):
    mask = (disc(side, soft=soft) * 255).round().astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    if mask.max() > 127:
        assert np.array_equal(read_mask(tmp_path / "a.png"), mask.astype(np.float32) / 255)


@pytest.mark.parametrize("levels", [3, 4, 5, 17])
def test_edges_of_few_levels_are_no_labels(tmp_path, levels):
    mask = (np.round(disc(300, soft=2) * (levels - 1)) / (levels - 1) * 255).astype(np.uint8)
    for size, way in ((300, Image.Resampling.NEAREST), (512, Image.Resampling.BILINEAR)):
        image = Image.fromarray(mask).resize((size, size), way)
        image.save(tmp_path / "a.png")
        assert np.array_equal(read_mask(tmp_path / "a.png"), np.asarray(image, np.float32) / 255)


def test_small_soft_masks_made_larger_are_no_labels(tmp_path):
    small = Image.fromarray((disc(64, soft=3) * 255).round().astype(np.uint8))
    image = small.resize((512, 512), Image.Resampling.NEAREST)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), np.asarray(image, np.float32) / 255)


def test_a_jpeg_of_a_mask_is_read_as_it_is(tmp_path):
    image = Image.fromarray((disc(200) * 255).round().astype(np.uint8))
    image.convert("RGB").save(tmp_path / "a.png", "JPEG")
    found = read_mask(tmp_path / "a.png")
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "a.png"))[..., 0].astype(np.float32) / 255)


@pytest.mark.parametrize("colour", [(128, 0, 0), (0, 128, 0), (192, 128, 0), (1, 1, 1)])
def test_one_colour_on_black_is_the_label(tmp_path, colour):
    place = np.zeros((64, 96), bool)
    place[20:40, 30:60] = True
    pixels = place[..., None] * np.array(colour, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), place.astype(np.float32))
    if max(colour) > 100:  # with soft edges
        Image.fromarray(pixels).resize((192, 128), Image.Resampling.BILINEAR).save(tmp_path / "a.png")
        found = read_mask(tmp_path / "a.png")
        assert found.max() == 1 and found.min() == 0 and len(np.unique(found)) > 2
        assert np.array_equal(found > 0.5, place.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("name", ["photograph", "on white"])
def test_coloured_pictures_are_no_masks(tmp_path, name):
    pixels = NOISE.copy()
    if name == "on white":
        pixels[:], pixels[5:15, 5:15] = 255, (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(MifoError, match=r"a\.png is coloured, but not one colour on black"):
        read_mask(tmp_path / "a.png")


def test_a_grey_instance_is_warned_of(tmp_path, caplog):
    Image.fromarray((disc(64) * 180).round().astype(np.uint8)).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").max() == np.float32(180) / 255
    assert "a.png reaches 0.71 of 1 only" in caplog.text
