"""The one kind of error a user can mend: its message says what is wrong where, and what to do."""


class UserError(ValueError):
    """A setting, file or checkpoint that cannot work. Tools print the message, without a traceback."""
