"""All measures of a set of pictures that were made from one source image."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from mifo.data.instances import InstanceSet
from mifo.data.saved_pictures import Picture
from mifo.errors import MifoError
from mifo.metrics.box_adherence import BoxAdherence, find_instance
from mifo.metrics.class_accuracy import ClassAccuracy, ClassAccuracyWhole, class_texts, whole_window
from mifo.metrics.crops import Box, crop_box, reference_crops
from mifo.metrics.evaluators import (
    ImageEncoder,
    ImageTextEncoder,
    load_image_encoder,
    load_image_text_encoder,
)
from mifo.metrics.instance import (
    Identification,
    InstanceConsistency,
    InstanceConsistencyClip,
    Leakage,
    leakage_matrix,
)
from mifo.metrics.metric import Features, Metric
from mifo.metrics.picture_similarity import PictureSimilarity
from mifo.metrics.presence import Missing, Twice
from mifo.metrics.prompt_similarity import PromptSimilarity, name_classes
from mifo.metrics.scores import Evaluation, Evaluator, Score, check_value
from mifo.metrics.settings import MetricsSettings

log = logging.getLogger(__name__)

METRICS: dict[str, type[Metric]] = {
    "editability": PromptSimilarity,
    "instance_consistency": InstanceConsistency,
    "instance_consistency_clip": InstanceConsistencyClip,
    "identification": Identification,
    "leakage": Leakage,
    "class_accuracy": ClassAccuracy,
    "class_accuracy_whole": ClassAccuracyWhole,
    "box_adherence": BoxAdherence,
    "missing": Missing,
    "twice": Twice,
    "picture_similarity": PictureSimilarity,
}


def best_of(metric: str) -> str:
    """Which of several values of a metric is the best: "max" or "min"."""
    return "max" if METRICS[metric].higher_is_better else "min"


def arrow(metric: str) -> str:
    """The direction in which a metric is better."""
    return {"max": "↑", "min": "↓"}[best_of(metric)]


def titled(metric: str) -> str:
    """A metric's name with the direction in which it is better."""
    return f"{metric.replace('_', ' ')} {arrow(metric)}"


class PictureEvaluator:
    """Holds the two evaluators and measures sets of pictures.

    Where boxes are known, instances are cropped by their box. A picture without boxes whose prompt names one
    instance counts as that instance's crop; with several, only its editability is measured.
    """

    def __init__(
        self, image_text: ImageTextEncoder, image: ImageEncoder, settings: MetricsSettings | None = None
    ) -> None:
        self.image_text, self.image, self.settings = image_text, image, settings or MetricsSettings()

    @classmethod
    def from_settings(
        cls, settings: MetricsSettings, device: torch.device | str = "cpu"
    ) -> "PictureEvaluator":
        """Load the evaluators. Raises MifoError when weights are missing."""
        batch_size, fit = settings.batch_size, settings.fit
        image_text = load_image_text_encoder(settings.image_text, batch_size, fit).to(device)
        return cls(image_text, load_image_encoder(settings.image, batch_size, fit, device), settings)

    def evaluate(
        self,
        pictures: Sequence[Picture],
        instances: InstanceSet,
        progress: Callable[[Sequence[Picture]], Iterable[Picture]] = iter,
    ) -> Evaluation:
        """Measure `pictures` against the image that their instances were learned from.

        `progress` wraps the loop over pictures (`rich.progress.track`).
        """
        if not pictures:
            raise MifoError("There is no picture to evaluate: make some with `mifo synthesize`.")
        tokens = instances.tokens
        class_names = instances.class_names or (None,) * len(tokens)
        cut_out = reference_crops(instances.image.float() / 255, instances.masks)
        references, references_clip = (each.encode_images(cut_out) for each in (self.image, self.image_text))
        texts, own_text = class_texts(self.settings.class_words, class_names)
        texts_clip = self.image_text.encode_texts(texts)
        prompts = [name_classes(picture.prompt, tokens, class_names) for picture in pictures]
        whole = self.image_text.encode_images([picture.image for picture in pictures])
        asked = self.image_text.encode_texts(prompts)
        warnings = self.image_text.warnings(prompts)
        for warning in warnings:
            log.warning("%s", warning)
        subjects = [_subjects(picture, tokens) for picture in pictures]
        cut_out = [
            crop_box(picture.image, box)
            for picture, boxes in zip(pictures, subjects, strict=True)
            for box in boxes.values()
        ]
        sizes = [len(boxes) for boxes in subjects]
        crops, crops_clip = (
            encoder.encode_images(cut_out).split(sizes) if cut_out else [torch.empty(0)] * len(pictures)
            for encoder in (self.image, self.image_text)
        )
        totals = {name: metric() for name, metric in METRICS.items()}
        counts = dict.fromkeys(METRICS, 0)
        rows, owns = [], []
        for index, picture in enumerate(progress(pictures)):
            boxes = subjects[index]
            own = torch.tensor([tokens.index(name) for name in boxes], dtype=torch.long)
            placed = list(boxes.values()) if picture.boxes else []
            found = [
                find_instance(picture.image, references[instance], box, self.image, self.settings.windows)
                for instance, box in zip(own, placed, strict=False)
            ]
            whole_crops = [
                crop_box(picture.image, whole_window(*each)) for each in zip(placed, found, strict=True)
            ]
            features = Features(
                whole_clip=whole[index : index + 1],
                prompt_clip=asked[index : index + 1],
                crops=crops[index] if boxes else None,
                crops_clip=crops_clip[index] if boxes else None,
                whole_crops_clip=self.image_text.encode_images(whole_crops) if placed else None,
                own=own,
                references=references,
                references_clip=references_clip,
                texts_clip=texts_clip,
                classes=own_text,
                boxes=torch.tensor(placed) if placed else None,
                found=torch.tensor(found) if placed else None,
            )
            rows.append(self._measured(features, totals, counts, index))
            owns.append(own)
        others = f", {self.settings.class_words} classes"
        scores = tuple(
            Score(
                name,
                totals[name].compute().item(),
                metric.higher_is_better,
                self._evaluator(name),
                # the choice among other classes is another measure
                self.settings.protocol + (others if issubclass(metric, ClassAccuracy) else ""),
                counts[name],
            )
            for name, metric in METRICS.items()
            if counts[name]
        )
        matrix: tuple[tuple[float | None, ...], ...] = ()
        if cut_out and len(tokens) > 1:
            means = leakage_matrix(torch.cat(crops), references, torch.cat(owns)).tolist()
            matrix = tuple(tuple(None if value != value else value for value in row) for row in means)
        return Evaluation(scores, tuple(rows), matrix, tuple(warnings))

    def _measured(
        self, features: Features, totals: dict[str, Metric], counts: dict[str, int], index: int
    ) -> dict[str, float]:
        """The scores of one picture by metric, which are added to `totals` and `counts`."""
        row: dict[str, float] = {}
        for name, metric in totals.items():
            inputs = metric.inputs(features)
            if inputs is None:
                continue
            values = [value.cpu() for value in inputs]
            counts[name] += len(values[0])
            # NaN is looked for first, since an argmax would hide it
            finite = all(value.isfinite().all() for value in values)
            row[name] = metric(*values).item() if finite else math.nan
            try:
                check_value(name, row[name])
            except ValueError as error:
                raise MifoError(
                    f"{name} of picture {index}, as {self._evaluator(name)} measures it: {error}; "
                    "take another evaluator in metrics"
                ) from error
        return row

    def _evaluator(self, metric: str) -> Evaluator:
        return (self.image_text if METRICS[metric].encoder == "image_text" else self.image).evaluator


def _subjects(picture: Picture, tokens: Sequence[str]) -> dict[str, Box]:
    """The instances that can be cropped from a picture, by token."""
    if picture.boxes:
        return {name: box for name, box in picture.boxes.items() if name in tokens}
    named = [token for token in tokens if token in picture.prompt]
    return {named[0]: (0.0, 0.0, 1.0, 1.0)} if len(named) == 1 else {}
