"""The errors that a person can put right, and how they are put in one line."""


class ITAError(Exception):
    """Something that the user can put right. The command line prints it in one line and exits with status 1."""

    exit_status = 1


class UsageError(ITAError):
    """A wrong argument or option. The command line exits with status 2."""

    exit_status = 2


def one_line(error: object, limit: int = 400) -> str:
    """The message of an error, or its type, as a single line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
