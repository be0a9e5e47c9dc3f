"""Run networks: one module per library behind `protocol.Backend`; `registry` finds the backend for a name.

A backend knows a bundle and the shape of a batch. It must not know slides, tiles or other backends.
"""
