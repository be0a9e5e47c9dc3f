"""Annotated images in the layouts that their publishers use.  Nothing here knows networks or losses."""
