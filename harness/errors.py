"""The one exception that means "the user can mend this", and what else a user can mend."""

import errno


class UserError(Exception):
    """A mistake in the user's input: one line that names the key, the value and the remedy.

    The command line prints the line and exits with code 2. Anything else that is raised is a defect of ours
    and keeps its traceback.
    """


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def mendable(error: Exception) -> UserError | None:
    """The line about ``error`` that a user can act on: itself, or a disk that takes nothing; None for a defect of ours.

    What was finished before stays on disk: files appear whole or not at all.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return UserError(
            f"disk: {error.filename or 'a file'}: {error.strerror}; free some space or choose another output_dir, then "
            "run the same command again: what is finished is kept"
        )
    return None
