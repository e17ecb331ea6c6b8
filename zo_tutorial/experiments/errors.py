"""The error that ends an experiment before it begins."""


class ExperimentError(ValueError):
    """A config, record or checkpoint that cannot be used; the message is one line and names the file."""

    def __init__(self, message: str):
        super().__init__("".join(sign if sign.isprintable() else " " for sign in message))  # what was given may not be


class BusyError(ExperimentError):
    """Another process is making this very record."""
