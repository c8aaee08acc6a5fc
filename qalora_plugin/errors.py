"""The one error type that users see.

Every message says what was found, what was expected, and what to do about it.
"""


class QALoraError(ValueError):
    """A config, checkpoint, adapter or flag that cannot be used as it is."""
