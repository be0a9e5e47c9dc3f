"""The engine: slides in, masks out, at the speed of the machine.

The rooms, each allowed to use only those before it: errors, settings, geometry, {slides, memory, journal,
models}, {reader, normalise, writer, backends}, runner, pipeline, scheduler, campaign, cli.
"""
