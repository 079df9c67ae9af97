"""Whether the libraries beneath an evaluation may speak: they do when PALIMPSEST_VERBOSE is set."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def verbose() -> bool:
    """Whether the environment asks for the libraries' own messages."""
    return bool(os.environ.get("PALIMPSEST_VERBOSE"))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, lm-eval, datasets and transformers report errors only and draw no bars of their own."""
    if verbose():
        yield
        return
    import datasets
    import lm_eval.api.task as lm_eval_task
    from transformers.utils import logging as transformers_logging

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "bitsandbytes")}
    levels = {name: logger.level for name, logger in loggers.items()}
    transformers_level = transformers_logging.get_verbosity()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    # lm-eval draws a bar over the documents of every task for every model, and has no switch for it.
    tqdm = lm_eval_task.tqdm
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    lm_eval_task.tqdm = lambda documents, **_: documents
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        transformers_logging.set_verbosity(transformers_level)
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()
        lm_eval_task.tqdm = tqdm
