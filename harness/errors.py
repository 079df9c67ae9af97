"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in the user's input: one line that names the key, the value and the remedy.

    The command line prints the line and exits with code 2. Anything else that is raised is a defect of ours
    and keeps its traceback.
    """
