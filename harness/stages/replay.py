"""The rows that are replayed: what of the old goes into the batches of the new."""

from harness.console import say
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.run_directory import RunDirectory
from harness.stages.answers import answered_rows
from harness.tasks.base import Task


def replay_rows(task: Task, run: RunDirectory) -> list[Row]:
    """Rows of ``data.replay``: the loss is on the response, or on all tokens where there is none; [] without replay.

    Raises:
        UserError: no row has a token with a loss.
    """
    config = task.config
    replay = config.data.replay
    if replay is None or replay.ratio == 0:
        return []
    if replay.answers:
        return answered_rows(config, run, task.tokenizer)
    key, source = ("data.replay.source", replay.source) if replay.source else ("data.preserve", config.data.preserve)
    if source is None:
        raise UserError("data.replay: no rows to replay; give data.preserve or data.replay.source")
    useful, others = task.useful_rows(source, key, "tokenise replay")
    rows = len(useful) + others
    if not useful:
        raise UserError(f"{key}: none of {rows} rows has a token to replay within data.max_length")
    if others:
        say(f"warning: {key}: {others} of {rows} rows have no token to replay and are left out")
    return useful
