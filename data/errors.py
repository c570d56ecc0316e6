"""Errors that are the user's to mend. The command line prints the message alone and exits with code 2."""


class UserError(ValueError):
    """Bad input: the message names the thing, its value, the limit and the remedy."""
