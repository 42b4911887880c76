"""The one error a user can cause and mend."""


class UserError(Exception):
    """Bad input. Its message is one line: which key or file, what was found, what would be right.

    The programs print that line without a traceback and exit with code 2.
    """
