"""What is exported of a learned result, and in which form."""

from dataclasses import dataclass

from mifo.errors import MifoError, check_known, check_least


@dataclass
class ExportSettings:
    """Files for other programs."""

    format: str = "diffusers"  # diffusers | webui: names of files and tensors; ComfyUI reads webui's
    weights: str = "lora"  # lora | pipeline (the base model with what was learned) | none (words alone)
    rank: int = 32  # of the LoRA
    precision: str = "float32"  # of the LoRA and the pipeline: float32 | float16; words keep 32 bits
    words: list[str] | None = None  # names of the instances there; None: <asset0>, in webui asset0


def check_export(settings: ExportSettings) -> None:
    """Refuse impossible settings before any model is loaded.

    Raises:
        MifoError: naming the key and the values that it takes.
    """
    check_known("format", settings.format, ("diffusers", "webui"))
    check_known("weights", settings.weights, ("lora", "pipeline", "none"))
    check_known("precision", settings.precision, ("float32", "float16"))
    check_least("", settings, rank=1)
    if settings.format == "webui" and settings.weights == "pipeline":
        raise MifoError(
            "weights=pipeline is a folder of diffusers, which webui does not read; take "
            "weights=lora, or format=diffusers."
        )


def exported_words(settings: ExportSettings, tokens: list[str]) -> list[str]:
    """What the words `tokens` are called elsewhere.

    Raises:
        MifoError: the settings name more or fewer words, one twice, or one that is no file's name.
    """
    plain = [token.strip("<>") for token in tokens]
    words = settings.words or (tokens if settings.format == "diffusers" else plain)
    # CLIP's tokenizers make no difference between capitals and small letters, nor do some file systems;
    # no file's name has the brackets
    if len(words) != len(tokens) or len({word.strip("<>").lower() for word in words}) != len(words):
        raise MifoError(
            f"words={','.join(words)} must be {len(tokens)} different words, one for each of "
            f"{', '.join(tokens)}; capitals make no difference."
        )
    for word in words:
        if not word.strip("<>") or any(letter in '/\\:*?"| ' for letter in word):
            raise MifoError(f"words: '{word}' is no name of a word; take letters, digits, - and _.")
    return words
