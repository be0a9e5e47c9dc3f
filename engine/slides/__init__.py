"""Slides: what images a path holds, and their pixels.  Nothing here knows models, tiles or labels."""
