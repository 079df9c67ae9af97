"""Tasks by name."""

from harness.config import RunConfig
from harness.tasks.base import CausalLM, Task


def task_class(name: str) -> type[Task]:
    """The class of a task; every name that `harness.config` allows has one."""
    if name == "causal_lm":
        return CausalLM
    if name == "image_text":
        from harness.tasks.image_text import ImageText

        return ImageText
    if name == "image_classification":
        from harness.tasks.image_classification import ImageClassification

        return ImageClassification
    from harness.tasks.encoders import ENCODER_TASKS

    return ENCODER_TASKS[name]


def load_task(config: RunConfig) -> Task:
    """The task of a run."""
    return task_class(config.task)(config)
