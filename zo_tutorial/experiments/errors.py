"""The error that ends an experiment before it begins."""


class ExperimentError(ValueError):
    """A config, record or checkpoint that cannot be used; the message is one line and names the file."""


class BusyError(ExperimentError):
    """Another process is making this very record."""
