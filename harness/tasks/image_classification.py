"""A class for each image: ViT, ConvNeXt-V2 and whatever else `AutoModelForImageClassification` loads.

A source is a folder with a sub-folder of images for each class, or rows with an image and a label (a name, a number, a
`datasets.ClassLabel`). Every stage that needs pixels opens the files again: a data set of images is larger than memory.

The classes of ``data.train`` are *new*; those that the base tells apart already, where it is a classifier, are *old*.
``model.head: new`` puts a fresh head for the new classes on the body (the protocol of VTAB, Zhai et al., 2019): old
classes are then measured by the base's own head on the tuned body. ``model.head: extended`` keeps the base's head and
adds rows for the new classes: one model tells all of them apart, and is measured as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.config import RunConfig, SourceConfig
from harness.console import progress
from harness.data.class_folders import class_folders, data_files, images_of_classes, is_class_folder
from harness.data.class_labels import Classes, Label, classes_of, labels_of, names_of_classes
from harness.data.collation import collate
from harness.data.images import Picture, pictures, without_bad_images
from harness.data.sources import read_rows
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.calling import arguments
from harness.tasks.base import Shown, Task
from harness.tasks.objectives import RowClass

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

PRESERVE = "data.preserve"


@dataclass(frozen=True)
class LabelledImage:
    """One image and the number of its class; None where the source does not say it. ``place``: its own, for people."""

    picture: Picture
    label: int | None
    place: str


@dataclass(frozen=True)
class ImageRow(Row):
    """An image as a model reads it; opened anew whenever its pixels are asked for.

    Attributes:
        picture: the image.
        processor: of the base, makes pixels.
    """

    picture: Picture | None = None
    processor: Any = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """``pixel_values``, (1, channels, height, width), fp32.

        Raises:
            UserError: the image is missing or damaged.
        """
        assert self.picture is not None
        return {"pixel_values": self.processor(self.picture.open(), return_tensors="pt")["pixel_values"]}

    def digests(self) -> list[str]:
        """Of the image's file."""
        assert self.picture is not None
        return [self.picture.digest()]


class ImageClassification(Task):
    """One of several classes for an image."""

    name = "image_classification"
    summary = "a class for an image"
    columns = ()
    objective = RowClass()
    metrics = ("accuracy",)
    has_head = True
    reads_text = False

    @cached_property
    def reader(self) -> Any:
        """The base's image processor, the one for PIL: with torchvision's, pixels would differ by machine."""
        from transformers import AutoImageProcessor

        path = self.config.model.path
        try:
            return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: no image processor in {path!r}: {_in_a_line(error)}") from error

    # -- classes -------------------------------------------------------------------------------------------------------

    @property
    def old_classes(self) -> Classes | None:
        """Those that the base tells apart; None where it is no classifier."""
        return self._base_classes(self.config.model.original)

    @cached_property
    def new_classes(self) -> Classes:
        """Those of ``data.train``.

        Raises:
            UserError: it cannot be read, a row has no class, or all have the same.
        """
        source = self.config.data.train
        found = self._class_names(source, "data.train")
        if len(found.names) < 2:
            raise UserError(
                f"data.train: {len(found.names)} class in {source.path}, a classifier tells at least two apart; if "
                "rows of others are to come, name all classes in data.train.classes"
            )
        return found

    @cached_property
    def classes(self) -> Classes:
        """Those of the head that is trained: the new ones, after the old ones where the base's head is extended.

        Raises:
            UserError: there is no head to extend, or the new classes have no names.
        """
        new = self.new_classes
        if self.config.model.head == "new":
            return new
        old = self.old_classes
        if old is None:
            raise UserError(
                f"model.head: extended given, and {self.config.model.original} has no head for images; set model.head: "
                "new"
            )
        for classes, remedy in ((new, "name them in data.train.classes"), (old, "save it with an id2label")):
            if not classes.named:
                raise UserError(
                    f"model.head: extended puts names of old and new classes together, and {classes.whose} are nothing "
                    f"but numbers; {remedy}, or set model.head: new"
                )
        names = (*old.names, *(name for name in new.names if name not in old.names))
        return Classes(names, True, f"the classes of {self.config.model.original} and data.train")

    @property
    def keeps_head(self) -> bool:
        """Whether the head that is trained is the base's own: the classes are the same, in the same order."""
        old = self.old_classes
        return old is not None and old.named and old.names == self.classes.names

    def head_options(self) -> dict[str, Any]:
        """The classes."""
        return {
            "id2label": dict(enumerate(self.classes.names)),
            "label2id": {name: number for number, name in enumerate(self.classes.names)},
        }

    def finish_head(self, model: "PreTrainedModel", drawn: set[str]) -> set[str]:
        """Put the base's rows into an extended head; draw a fresh one where its size would have let the base's in.

        Args:
            model: with the head that ``from_pretrained`` gave it.
            drawn: parameters that it has drawn.

        Returns:
            Those that are drawn now.

        Raises:
            UserError: the model has no head beside its body, or one whose rows are not those of classes.
        """
        from harness.tasks.class_head import draw_anew, head_parameters, keep_old_rows

        config = self.config.model
        head = head_parameters(model).keys()
        if config.head == "extended":
            return drawn - keep_old_rows(model, config.with_head(config.original, ()), drawn)
        if self.keeps_head or self.old_classes is None:
            return drawn
        if fitting := head - drawn:  # and yet of another meaning
            draw_anew(model, config, fitting)
        return drawn | head

    # -- data ----------------------------------------------------------------------------------------------------------

    def check(self, key: str, source: SourceConfig) -> None:
        """Raise `UserError` where a source has no images or no classes that this run needs, or no head for them.

        Of a local source all labels are looked at, and no image.
        """
        if not is_class_folder(source):
            if source.image is None:
                beside = data_files(Path(source.path))
                files = f" and no data files, such as {beside[0].name}, beside them" if beside else ""
                raise UserError(
                    f"{key}.image: missing; name the column of images in {source.path}, or give a folder with a "
                    f"sub-folder for each class{files}"
                )
            if source.response is None and key != PRESERVE:
                raise UserError(f"{key}.response: missing; name the column of classes in {source.path}")
        if key == "data.train" and Path(self.config.model.path).is_dir():
            self._check_model()
        if key == PRESERVE:
            self._check_uses_of_preserve(source)
        elif self.config.model.head == "new" and key.startswith("penalties."):
            raise UserError(
                f"{key}: it is of the loss on old data, and the head that model.head: new trains has no old classes; "
                "set model.head: extended"
            )
        asked = key == PRESERVE and "preserve" in (*self.config.eval.knowledge, *self.config.eval.task)
        old = asked or self.config.model.head == "extended"
        # What else there is may be far away.
        if Path(source.path).exists() and (not old or Path(self.config.model.original).is_dir()):
            (self.retention() if asked else self)._labelled_pictures(source, key)

    def labelled(self, source: SourceConfig) -> bool:
        """Whether rows have classes, and the head that is trained has them: not those of preserve beside a new head."""
        if self.config.model.head == "new" and source is self.config.data.preserve:
            return False
        return _has_labels(source)

    def read(self, source: SourceConfig, key: str) -> list[LabelledImage]:
        """All images of ``source`` that can be opened.

        Raises:
            UserError: it cannot be read, an image is missing or damaged and ``data.bad_images`` is ``refuse``, or a
                row has a class that the head does not have.
        """
        found = self._labelled_pictures(source, key)
        good = without_bad_images([(one.picture,) for one in found], self.config.data.bad_images, key)
        return [found[place] for place in good]

    def rows(self, examples: Sequence[LabelledImage], description: str = "images") -> list[Row]:
        """A row for each image; nothing is opened yet."""
        return [ImageRow([], [], one.label, picture=one.picture, processor=self.reader) for one in examples]

    def probe_row(self, row: Row) -> Row:
        """The row without its class: of an image there is no shorter one."""
        return replace(row, answer=None)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def predict(self, model: "nn.Module", examples: Sequence[LabelledImage], batch_size: int) -> list[int]:
        """The number of the most probable class of each image."""
        rows, device, found = self.rows(examples), next(model.parameters()).device, []
        model.eval()
        for start in progress(range(0, len(rows), batch_size), "evaluate"):
            batch = collate(rows[start : start + batch_size], self.pad_id)
            with torch.inference_mode():
                inputs = arguments(model, {name: tensor.to(device) for name, tensor in batch.items()})
                logits = self.objective.logits(model(**inputs), batch)
            if logits.isnan().any():
                raise UserError(
                    "eval: the model's outputs are NaN; lower train.learning_rate, or try model.dtype: float32"
                )
            found += logits.argmax(-1).tolist()
        return found

    def score(self, metric: str, predictions: Sequence[int], examples: Sequence[LabelledImage]) -> list[float]:
        """``accuracy``: whether the class is the right one."""
        return [float(found == one.label) for found, one in zip(predictions, examples, strict=True)]

    def shown(self, example: LabelledImage, prediction: int) -> Shown:
        """By the classes' names."""
        names = self.classes.names
        expected = "" if example.label is None else names[example.label]
        return Shown(example.place, expected, names[prediction])

    def retention(self) -> "ImageClassification":
        """Beside a new head, the classes of the base's own head."""
        return self if self.config.model.head == "extended" else OldClasses(self.config)

    def retention_model(self, model: "nn.Module") -> "nn.Module":
        """``model``'s body under the head of the original base.

        Raises:
            UserError: the base has no such head.
        """
        if self.config.model.head == "extended":
            return model
        from harness.models.loading import load_model, whole_weights

        assert OldClasses(self.config).classes  # else there is no head to load
        with whole_weights():
            base = load_model(self.config.model.with_head(self.config.model.original, ()))
        base.base_model.load_state_dict(model.base_model.state_dict())
        return base.to(next(model.parameters()).device)

    # -- the parts of these --------------------------------------------------------------------------------------------

    def _classes_of(self, key: str) -> Classes | None:
        """The classes that labels of a source are numbers of; None where they say nothing to the head."""
        return None if key == PRESERVE and self.config.model.head == "new" else self.classes

    def _base_classes(self, path: str) -> Classes | None:
        config = _described(path)
        if not any("ForImageClassification" in name for name in config.architectures or ()):
            return None
        names = tuple(config.id2label[number] for number in range(len(config.id2label)))
        named = not all(name in (str(number), f"LABEL_{number}") for number, name in enumerate(names))
        return Classes(names, named, f"the classes of {path}")

    def _class_names(self, source: SourceConfig, key: str) -> Classes:
        whose = f"the classes of {key}"
        if source.classes is not None:
            twice = [name for name in source.classes if source.classes.count(name) > 1]
            if twice:
                raise UserError(f"{key}.classes: {twice[0]!r} stands there twice; every class has a name of its own")
            return Classes(tuple(source.classes), True, whose)
        if is_class_folder(source):
            return Classes(tuple(folder.name for folder in class_folders(source, key)), True, whose)
        if source.response is None:
            raise UserError(f"{key}.response: missing; name the column of classes in {source.path}")
        rows = read_rows(source, key)
        names = names_of_classes(rows, source)
        return classes_of(labels_of(rows, source, key), whose) if names is None else Classes(tuple(names), True, whose)

    def _labelled_pictures(self, source: SourceConfig, key: str) -> list[LabelledImage]:
        """All images of a source, of which none is opened, with the numbers of their classes."""
        classes = self._classes_of(key)
        found, places, labels = self._read(source, key)
        numbers: list[int | None] = [None] * len(found)
        if classes is not None and labels is not None:
            field = f"{key}.{'path' if is_class_folder(source) else 'response'}"
            numbers = [classes.number(label, field) for label in labels]
        return [LabelledImage(*parts) for parts in zip(found, numbers, places, strict=True)]

    def _read(self, source: SourceConfig, key: str) -> tuple[list[Picture], list[str], list[Label] | None]:
        """The images of a source, their places, and what it says of their classes, if anything."""
        if is_class_folder(source):
            numbers = {name: number for number, name in enumerate(source.classes or ())}
            files = images_of_classes(source, key)
            found = [Picture(f"{key}.path", lambda file=file: file) for file, _ in files]
            labels = [Label(name, numbers.get(name), str(file)) for file, name in files]
            return found, [f"{name}/{file.name}" for file, name in files], labels
        rows = read_rows(source, key)
        assert source.image is not None
        where = f"row {{}} of {Path(source.path).name}"
        path = Path(source.path)
        folder = Path(source.image_folder or (path.parent if path.is_file() else path))
        own = pictures(rows, source.image, folder, f"{key}.image: {where}")
        for number, images in enumerate(own):
            if len(images) != 1:
                raise UserError(
                    f"{key}.image: row {number} of {source.path} has {len(images)} images in {source.image!r}; task "
                    f"{self.name!r} reads one a row"
                )
        places = [where.format(number) for number in range(len(own))]
        labels = None if source.response is None else labels_of(rows, source, key)
        return [images[0] for images in own], places, labels

    def _check_model(self) -> None:
        from transformers import AutoModelForImageClassification

        described = _described(self.config.model.path)
        try:
            model = AutoModelForImageClassification._model_mapping[type(described)]
        except KeyError as error:
            raise UserError(
                f"model.path: {self.config.model.path} is a {described.model_type}, which has no form that tells "
                "classes of images apart; give a ViT, a ConvNeXt-V2 or their like"
            ) from error
        models = model if isinstance(model, tuple) else (model,)
        if self.config.train.gradient_checkpointing and not models[0].supports_gradient_checkpointing:
            raise UserError(
                f"train.gradient_checkpointing: true given, and {models[0].__name__} has no such thing; leave it out"
            )

    def _check_uses_of_preserve(self, source: SourceConfig) -> None:
        """What looks at the loss on preserve rows needs their classes in the head, and labels."""
        config = self.config
        key = _use_of_preserve(config)
        if key is not None and config.model.head == "new":
            raise UserError(
                f"{key}: it is about the loss on data.preserve, and the head that model.head: new trains has no old "
                "classes; set model.head: extended"
            )
        if (
            not is_class_folder(source)
            and source.response is None
            and (key or "preserve" in (*config.eval.knowledge, *config.eval.task))
        ):
            raise UserError(f"{PRESERVE}.response: missing; {key or 'eval: preserve'} needs the classes of its images")


class OldClasses(ImageClassification):
    """The classes of the base's own head, for models whose body has moved under it: how much of them was kept."""

    @cached_property
    def classes(self) -> Classes:
        """The base's.

        Raises:
            UserError: it has no such head.
        """
        old = self.old_classes
        if old is None:
            raise UserError(
                f"eval: preserve is measured by the base's own head, and {self.config.model.original} has "
                "none for images; give a base that was trained as a classifier, or leave it out"
            )
        return old

    def labelled(self, source: SourceConfig) -> bool:
        """Whether rows have classes."""
        return _has_labels(source)

    def _classes_of(self, key: str) -> Classes:
        return self.classes

    def retention(self) -> ImageClassification:
        """This task."""
        return self


def _has_labels(source: SourceConfig) -> bool:
    return source.response is not None or is_class_folder(source)


def _use_of_preserve(config: RunConfig) -> str | None:
    """The key of the first thing that looks at the loss on preserve rows; None where nothing does."""
    from harness.methods.registry import build_method
    from harness.training.penalties.registry import entry_needs, penalty_entries

    if config.train.preserve_loss_steps is not None:
        return "train.preserve_loss_steps"
    if config.data.replay is not None and config.data.replay.source is None:
        return "data.replay"
    for number, entry in enumerate(penalty_entries(config)):
        if entry_needs(entry).preserve and not entry_needs(entry).original_model:  # which is refused for all heads
            return "anchor" if entry["name"] == "anchor" else f"penalties.{number}"
    method = build_method(config.method, config.train.seed)
    request, probe = method.statistics(), method.probe()
    if probe is not None:
        return f"method.{probe.option}: auto"
    if request is not None and request.data == "preserve" and request.needs_gradients:
        return "method.name"
    return None


def _described(path: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} cannot be loaded: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
