"""Keep a pool of workers busy (threads, local processes, any dask cluster, SLURM), and end a run at a signal.

It must not know what a task does.
"""
