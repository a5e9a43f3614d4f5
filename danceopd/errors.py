"""Exceptions a user is meant to read: what is wrong, where, how to mend it; or that the work was interrupted."""


class UserError(ValueError):
    """Bad input (file, row, field, image, recipe, checkpoint, flag).

    The command line prints its message on one line and exits with code 2; no traceback.
    """


def unknown_name(kind: str, name: object, known) -> UserError:
    """A `UserError` for a name that is not in a table, listing the right ones."""
    return UserError(f"{kind}: {name!r} is not known; choose one of: {', '.join(sorted(map(str, known)))}")


class Interrupted(SystemExit):
    """The work was asked to end and can be gone on with: the process ends with code 75 (EX_TEMPFAIL, try again)."""

    def __init__(self, message: str):
        super().__init__(75)
        self.message = message

    def __str__(self) -> str:
        return self.message
