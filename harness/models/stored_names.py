"""Under which names a checkpoint's files store what a model calls otherwise.

transformers renames weights while it loads them: LLaVA's files say ``language_model.model.layers.0…`` where the model
has ``model.language_model.layers.0…``, and a body's files leave out the prefix that the body has within a larger model.
What is merged or read weight by weight asks here; files keep the names that they have.

Warning:
    Weights that transformers puts together out of several (experts of a mixture) are in no file by themselves; they are
    left out here. The rules are transformers' own, of a part of it that is not documented.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def parameter_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Stored name → name of the parameter (or buffer) of ``model`` that `from_pretrained` puts it into.

    Names of nothing in the model are left out, and those of which a parameter is only made with others.

    Args:
        model: with or without weights.
        stored: names of tensors in a checkpoint's files.
    """
    own = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in sorted(stored):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if converter is None and renamed in own:
            found[name] = renamed
    return found
