"""The kernels that run the chapters encrypt what they say: each would greet with a warning."""

import zmq
from jupyter_client import KernelManager


def setup(app):
    # Older versions neither have it nor warn.
    encryption = getattr(KernelManager, "transport_encryption", None)
    if encryption is not None and zmq.has("curve"):
        encryption.default_value = "auto"
    return {"parallel_read_safe": True}
