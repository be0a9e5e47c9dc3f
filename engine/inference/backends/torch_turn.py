"""The turn to use torch's modules: one thread of the process has it at a time.

While ``torch.fx``, ``torch.export`` and ``torch.compile`` trace a network, they replace ``nn.Module.__call__`` of the
whole process, so a network that runs in another thread meanwhile would be traced too, and fail.
"""

from __future__ import annotations

import threading

TORCH_TURN = threading.RLock()
