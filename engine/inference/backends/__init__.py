"""One module for each library that can run a network, behind `protocol.Backend`; `registry` lists them.

A backend knows a bundle and the shape of a batch. It must not know slides, tiles or other backends.
"""
