"""Errors that a user can put right, and how they are put in one line."""


class ITAError(Exception):
    """An error that the user can put right. The command line prints it in one line and exits with status 1."""

    exit_status = 1


class UsageError(ITAError):
    """A wrong argument or option. The command line exits with status 2."""

    exit_status = 2


def one_line(error: object, limit: int = 400) -> str:
    """Return the message of an error, or its type, as a single line of at most `limit` characters.

    Characters that UTF-8 cannot hold, as in names of files that are not UTF-8, become backslash escapes.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"
