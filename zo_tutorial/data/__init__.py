"""The data sets of the book, each in full or in a small form that needs no network: see `zo_tutorial.data.mnist`
and `zo_tutorial.data.atis`."""


class DataError(ValueError):
    """Data that is missing, damaged or too small for what is asked; the message is one line and names the file."""
