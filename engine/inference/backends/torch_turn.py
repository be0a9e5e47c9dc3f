"""The turn to use torch's modules: one thread of the process has it at a time.

``torch.fx``, ``torch.export`` and ``torch.compile`` replace ``nn.Module.__call__`` of the whole process while they trace
a network, so a network that runs in another thread meanwhile would be traced too, and fail.
"""

from __future__ import annotations

import threading

TORCH_TURN = threading.RLock()
