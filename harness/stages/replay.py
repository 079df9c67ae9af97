"""The rows that are replayed: what of the old goes into the batches of the new."""

from transformers import PreTrainedTokenizerBase

from harness.config import RunConfig
from harness.console import say
from harness.data.sources import read_examples
from harness.data.tokenisation import IGNORED, Row, tokenise
from harness.errors import UserError
from harness.run_directory import RunDirectory
from harness.stages.answers import answered_rows


def replay_rows(config: RunConfig, run: RunDirectory, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of ``data.replay``: the loss is on the response, or on all tokens where there is none; [] without replay.

    Raises:
        UserError: no row has a token with a loss.
    """
    replay = config.data.replay
    if replay is None or replay.ratio == 0:
        return []
    if replay.answers:
        return answered_rows(config, run, tokenizer)
    key, source = ("data.replay.source", replay.source) if replay.source else ("data.preserve", config.data.preserve)
    if source is None:
        raise UserError("data.replay: no rows to replay; give data.preserve or data.replay.source")
    rows = tokenise(read_examples(source, key), tokenizer, config.data.max_length, "tokenise replay")
    # The first token is predicted by nothing, so its label never counts.
    useful = [row for row in rows if any(label != IGNORED for label in row.labels[1:])]
    if not useful:
        raise UserError(f"{key}: none of {len(rows)} rows has a token to replay within data.max_length")
    if len(useful) < len(rows):
        say(f"warning: {key}: {len(rows) - len(useful)} of {len(rows)} rows have no token to replay and are left out")
    return useful
