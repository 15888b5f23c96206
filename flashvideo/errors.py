"""What a command of `python -m flashvideo` can refuse to do."""


class CommandError(Exception):
    """A command can't do what it was asked to; the message says why, and is for the one who typed it.

    `hint` names the option of the command line that helps; a node, which has no such options, shows the message alone.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def with_hint(self) -> str:
        """The message, and the hint after it."""
        return f"{self} {self.hint}".rstrip()
