"""The model card of an exported result: what it is, what it was learned on, how it is used."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from mifo.backbones.learned import Learned
from mifo.data.instances import InstanceSet
from mifo.data.saved_pictures import as_image
from mifo.exporting.formats import lora_name
from mifo.exporting.low_rank import LowRank
from mifo.exporting.settings import ExportSettings
from mifo.metrics.scores import Score
from mifo.report.drawing import fit
from mifo.report.masked_picture import draw_masks
from mifo.report.tables import markdown_text

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(
    settings: ExportSettings,
    learned: Learned,
    words: Sequence[str],
    files: Mapping[str, Iterable[str]],
    kind: str,
    absent: Sequence[str],
    weights: LowRank | None,
    scores: Sequence[Score],
    thumbnail: str | None,
) -> str:
    """Markdown with the head that the hub of Hugging Face reads. What a stranger may have written is text.

    Args:
        words: what the instances are called there. files: of words, by text encoder.
        kind: of the pipeline, a class of diffusers. absent: its parts that are not there.
        weights: the LoRA, if there is one. thumbnail: a file beside the card.
    """
    source = learned.base["source"] or ""
    on_hub = _HUB_ID.fullmatch(source) is not None and not Path(source).exists()
    base = source if on_hub else str(learned.base["name"])
    told_base = f"{base} at revision {learned.base['revision']}" if learned.base["revision"] else base
    head = ["---", *([f"base_model: {source}"] if on_hub else []), "library_name: diffusers"]
    head += ["tags: [text-to-image, textual-inversion, mifo]", "---"]
    told = learned.class_names or ["of no named class"] * len(words)
    steps = ", ".join(f"{name} {count} steps" for name, count in learned.stages.items())
    lines = [
        *head,
        f"# {', '.join(f'`{word}`' for word in words)}",
        "",
        f"Learned from one picture by MIFO (arXiv 2511.00542) on {markdown_text(told_base)}, weights "
        f"{markdown_text(learned.base['fingerprint'] or '')[:12]}; {markdown_text(steps)}; learned beside "
        f"the words: {learned.trainable}. The licence of the base model applies.",
        "",
        *([f"![The picture, and its instances]({thumbnail})", ""] if thumbnail else []),
        "| word | instance |",
        "| --- | --- |",
        *(f"| `{word}` | {markdown_text(name)} |" for word, name in zip(words, told, strict=True)),
        "",
    ]
    if weights is not None:
        lines += [
            f"The LoRA has rank {settings.rank} and lacks {weights.error:.2%} of what the weights learned, a "
            f"norm over a norm; {weights.left_out:.2%} are norms, biases and others that it cannot hold.",
            "",
        ]
    if settings.format == "diffusers":
        script = _python(
            settings, base, learned.base["revision"], words, files, kind, absent, weights is not None
        )
        lines += ["```python", *script, "```"]
    else:
        lines += [
            "Put the files of the words into `embeddings`; a file's name is its word, which ComfyUI's prompt "
            f"calls `embedding:{words[0]}`."
        ]
        if weights is not None:
            lines += [
                "Put `mifo.safetensors` into `models/Lora`, and write `<lora:mifo:1>` in the prompt; for "
                "ComfyUI, put it into `models/loras` and add the node that loads a LoRA."
            ]
    if scores:
        lines += ["", "| metric | better | mean | measured by |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {each.metric} | {each.arrow} | {each.value:.3f} | "
            f"{markdown_text(f'{each.evaluator} ({each.protocol})')} |"
            for each in scores
        ]
    return "\n".join(lines) + "\n"


def _python(
    settings: ExportSettings,
    base: str,
    revision: str | None,
    words: Sequence[str],
    files: Mapping[str, Iterable[str]],
    kind: str,
    absent: Sequence[str],
    has_lora: bool,
) -> list[str]:
    """How a script beside the card uses the folder."""
    head = ["import torch", f"from diffusers import {kind}", "", 'FOLDER = "."  # where this page lies']
    prompt = f'pipe("a photo of {" and ".join(words)}").images[0].save("picture.png")'
    precision = ", torch_dtype=torch.float32"  # else text encoders keep their file's, and others do not
    if settings.weights == "pipeline":
        without = "".join(f", {part}=None" for part in absent)
        made = f'pipe = {kind}.from_pretrained(f"{{FOLDER}}/pipeline"{without}{precision})'
        return [*head, made, prompt]
    at = f", revision={json.dumps(revision)}" if revision else ""
    place = "" if _HUB_ID.fullmatch(base) else "  # a folder: say where it lies"
    lines = [*head, f"pipe = {kind}.from_pretrained({json.dumps(base)}{at}{precision}){place}"]
    for network, own in files.items():
        tokenizer = network.replace("text_encoder", "tokenizer")
        where = "" if len(files) == 1 else f", text_encoder=pipe.{network}, tokenizer=pipe.{tokenizer}"
        lines += [f'pipe.load_textual_inversion(f"{{FOLDER}}/{file}"{where})' for file in own]
    if len(files) > 1:
        lines += [
            "# this encoder reads a pooled state at the largest id, which a new word has: at the end instead",
            "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
        ]
    if has_lora:
        lines += [f'pipe.load_lora_weights(FOLDER, weight_name="{lora_name(settings.format)}")']
    return [*lines, prompt]


def thumbnail(instances: InstanceSet, side: int = 320) -> Image.Image:
    """The picture, and beside it the picture with its instances in colour."""
    picture = fit(as_image(instances.image), side, side)
    both = Image.new("RGB", (2 * picture.width + 8, picture.height), "white")
    both.paste(picture)
    both.paste(draw_masks(picture, instances.masks), (picture.width + 8, 0))
    return both
