"""Run ``cellseg-batch`` as ``python -m cellseg_batch.engine.cli``."""

from cellseg_batch.engine.cli.main import main

main()
