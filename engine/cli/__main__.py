"""``python -m cellseg_batch.engine.cli`` is ``cellseg-batch``."""

from cellseg_batch.engine.cli.main import main

main()
