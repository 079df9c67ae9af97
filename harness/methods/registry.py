"""Methods by name."""

import itertools
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from harness.config import ModelConfig, RunConfig
from harness.methods.base import Method, StatisticsRequest
from harness.plugins import find_class, names

_PACKAGE, _GROUP, _HELPERS = "harness.methods", "harness.methods", {"base", "registry", "singular_form"}


def method_class(name: str) -> type[Method]:
    """The method class called ``name``. Raises `UserError` for an unknown one."""
    return find_class(name, _PACKAGE, _GROUP, Method, _HELPERS, "method")


def method_names() -> list[str]:
    """Every known method, sorted."""
    return names(_PACKAGE, _GROUP, _HELPERS)


def build_method(config: dict[str, Any], seed: int, model: ModelConfig | None = None) -> Method:
    """The method of a resolved configuration.

    ``seed`` is for methods that draw random tensors, ``model`` for those whose tensors depend on how the base is
    stored (LoftQ).
    """
    cls = method_class(config["name"])
    options = cls.Options.model_validate({key: value for key, value in config.items() if key != "name"})
    return cls(options, seed, model)


def example_options(cls: type[Method]) -> list[dict[str, Any]]:
    """Options of a method in every combination of its required choices, the others left out.

    Empty where an option is required that is no choice between values.
    """
    required = {name: _choices(f.annotation) for name, f in cls.Options.model_fields.items() if f.is_required()}
    return [dict(zip(required, values, strict=True)) for values in itertools.product(*required.values())]


def needs(cls: type[Method]) -> dict[str, list[str]]:
    """What a method takes statistics from, asked of the method itself → the options with which it does.

    The options are the required choices, and any other choice that changes the answer. One answer for all of them
    has an empty list.
    """
    answers: dict[str, list[str]] = {}
    for example in example_options(cls):
        usual = _answer(cls, example)
        answers.setdefault(usual, []).append(_label(example))
        for name, field in cls.Options.model_fields.items():
            for value in _choices(field.annotation) if name not in example else ():
                try:
                    other = _answer(cls, example | {name: value})
                except ValidationError:  # a choice that asks for another one
                    continue
                if other != usual:
                    answers.setdefault(other, []).append(_label(example | {name: value}))
    return answers if len(answers) > 1 else {answer: [] for answer in answers}


def _choices(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _label(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    )


def _answer(cls: type[Method], options: dict[str, Any]) -> str:
    request = cls(cls.Options.model_validate(options)).statistics()
    if request is None:
        return "nothing"
    key = "data.preserve" if request.data == "preserve" else "data.train"
    return f"{key}, with gradients" if request.needs_gradients else key


def required_statistics(config: RunConfig) -> StatisticsRequest | None:
    """What the calibrate stage collects: the method's statistics, or, over an NF4 base, at least input covariances.

    The output error of quantisation is measured on calibration inputs, whatever the method.
    """
    method = build_method(config.method, config.train.seed)
    request = method.statistics()
    if request is None and config.model.quantization == "nf4":
        return StatisticsRequest(("input_covariance",), "target")
    return request
