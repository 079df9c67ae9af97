"""calibrate: collect the statistics that the method asks for, on all ranks."""

from harness.config import RunConfig
from harness.console import progress, say
from harness.data.collation import collate
from harness.data.sampling import sample
from harness.data.sources import read_examples
from harness.data.tokenisation import Row, tokenise
from harness.errors import UserError
from harness.methods.registry import build_method
from harness.models.loading import load_model, load_tokenizer
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.run_directory import RunDirectory
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.store import write_statistics
from harness.training.distributed import barrier, rank, share, training_device

BATCH_ROWS = 8
PROBE_TOKENS = 8


def calibrate(config: RunConfig, run: RunDirectory) -> None:
    """Write ``statistics/``; nothing where the method needs none.

    Raises:
        UserError: the method needs a preserve set and there is none, or a row is unusable.
    """
    request = build_method(config.method, config.train.seed).statistics()
    if request is None:
        return
    key = "preserve" if request.data == "preserve" else "train"
    source = getattr(config.data, key)
    if source is None:
        raise UserError(f"data.preserve: missing; method {config.method['name']!r} takes statistics from it")
    tokenizer = load_tokenizer(config.model.path)
    examples = sample(read_examples(source, f"data.{key}"), source.samples, "calibrate", config.train.seed, 0)
    # Rows of like length together: less padding, and, padding being masked, the same numbers.
    rows = sorted(tokenise(examples, tokenizer, config.data.max_length), key=lambda row: len(row.input_ids))
    _check(rows, f"data.{key}")
    device = training_device()
    model = load_model(config.model, device)
    modules = target_modules(model, config.model.target_modules)
    probe = collate([Row(rows[0].input_ids[:PROBE_TOKENS], [])], tokenizer.pad_token_id)
    inputs = {name: probe[name].to(device) for name in ("input_ids", "attention_mask")}
    groups = input_groups(model, modules, {**inputs, "use_cache": False})
    mine = share([rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)])
    batches = (collate(batch, tokenizer.pad_token_id) for batch in progress(mine, "calibrate"))
    covariances = collect_input_covariance(model, modules, groups, batches)
    tokens = next(iter(covariances.values())).tokens
    widest = max(module.in_features for module in modules.values())
    if tokens < widest:
        say(
            f"warning: data.{key}.samples: {tokens} tokens for layers up to {widest} wide; their covariance has rank "
            f"{tokens} at most and damping fills the rest; more samples or longer texts make it sharper"
        )
    if rank() == 0:
        write_statistics(run.statistics, covariances, groups)
    barrier()
    say(f"calibrate: {len(covariances)} input covariances over {tokens} tokens serve {len(modules)} layers")


def _check(rows: list[Row], key: str) -> None:
    empty = sum(not row.input_ids for row in rows)
    if empty:
        raise UserError(f"{key}: {empty} of {len(rows)} sampled rows have no tokens; remove empty rows")
