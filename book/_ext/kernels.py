"""The kernels that run the chapters encrypt what they say. Otherwise each greets the build with a warning."""

import zmq
from jupyter_client import KernelManager


def setup(app):
    encryption = getattr(KernelManager, "transport_encryption", None)  # older versions neither have it nor warn
    if encryption is not None and zmq.has("curve"):
        encryption.default_value = "auto"
    return {"parallel_read_safe": True}
