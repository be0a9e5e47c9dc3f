"""Where the time goes: a sample of a slide with a clock on every stage, and benchmarks that compare machines.

It runs the very code of a run and must not have a path of its own through the pixels.
"""
