"""The engine: slides in, masks out, at the speed of the machine.

DESIGN.md lists the folders and says which may import which.
"""

import time

# A user waits for the imports too, so a command's clock starts before them.
IMPORTED_AT = time.perf_counter()
