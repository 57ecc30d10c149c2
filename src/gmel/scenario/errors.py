"""The one exception for what a user can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used, said in one line.

    The message names the field or file, the value, what is allowed and what to do. The command line prints it
    as it is and exits with 2; it never wraps a defect of the program itself.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
