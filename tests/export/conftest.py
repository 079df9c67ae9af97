"""Each method at step 0, made once a module."""

from tests.methods.conftest import started

__all__ = ["started"]
