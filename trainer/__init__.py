"""The trainer: annotated images in, a model bundle out.  It never imports the engine."""
