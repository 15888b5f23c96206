"""What a command of `python -m flashvideo` can refuse to do."""


class CommandError(Exception):
    """A command can't do what it was asked to; the message says why, and is for the one who typed it."""
