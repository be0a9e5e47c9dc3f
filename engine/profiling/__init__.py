"""Measure where time goes: a profile of every stage on a sample of a slide, and benchmarks that compare machines.

This folder measures the code that runs use. It must not have a pixel path of its own.
"""
