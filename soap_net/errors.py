"""The one error type that the command line shows as a single line."""


class UserError(ValueError):
    """Something the user can mend: a bad file, setting or data set. Its text is one line that names it."""
