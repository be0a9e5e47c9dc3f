"""Keeps a pool of workers busy: threads, processes of this machine, any dask cluster, SLURM; signals that end a run.

It must not know what a task does.
"""
