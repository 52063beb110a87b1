"""The contact sheet as one HTML page that needs nothing beside itself."""

import base64
import io
import re

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from mifo.data.saved_pictures import as_image
from mifo.metrics.crops import mask_box
from mifo.report.content import EXPLANATIONS, LABELS, Sheet
from mifo.report.drawing import fit
from mifo.report.masked_picture import draw_masks
from mifo.report.palette import hexadecimal, instance_colour, name_colours, text_colour

SHARP = 768  # smaller pictures are enlarged to this many pixels: browsers enlarge less well


def sheet_html(sheet: Sheet) -> str:
    """Return the page: pictures as data URLs, boxes over them, light or dark by the reader's own setting."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mifo.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"data_url": _data_url, "prompt": _prompt}
    source = as_image(sheet.source)
    instances = []
    for index, (token, name, mask) in enumerate(
        zip(sheet.tokens, sheet.class_names, sheet.masks, strict=True)
    ):
        x0, y0, x1, y1 = mask_box(mask)
        instances.append(
            {"token": token, "name": name, "style": _style(index), "x": (x0 + x1) / 2, "y": (y0 + y1) / 2}
        )
    pictures = [
        {
            "image": as_image(picture.image),
            "prompt": picture.prompt,
            "seed": picture.seed,
            "boxes": [
                {"name": name, "box": box, "style": _colours(colour)}
                for (name, box), colour in zip(
                    picture.boxes.items(), name_colours(picture.boxes).values(), strict=True
                )
            ],
            "scores": sheet.scores_of(index),
        }
        for index, picture in enumerate(sheet.pictures)
    ]
    return environment.get_template("sheet.html.j2").render(
        sheet=sheet,
        source=source,
        masked=draw_masks(_enlarge(source), sheet.masks),
        instances=instances,
        pictures=pictures,
        labels=LABELS,
        explanations=EXPLANATIONS,
    )


def _colours(colour: tuple[int, int, int]) -> str:
    return f"--c:{hexadecimal(colour)};--on:{hexadecimal(text_colour(colour))}"


def _style(index: int) -> str:
    return _colours(instance_colour(index))


def _enlarge(image: Image.Image) -> Image.Image:
    return fit(image, SHARP, SHARP) if max(image.size) < SHARP else image


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    _enlarge(image).save(buffer, "WEBP", quality=92, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _prompt(text: str) -> Markup:
    """Escape a prompt and put each instance token on its colour."""
    parts = re.split(r"(<asset\d+>)", text)
    return Markup("").join(
        Markup('<span class="chip" style="{}">{}</span>').format(_style(int(part[6:-1])), part)
        if index % 2
        else escape(part)
        for index, part in enumerate(parts)
    )
