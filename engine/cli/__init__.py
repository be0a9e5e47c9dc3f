"""The command line: commands, their flags, progress, and everything that is printed.

A command turns its flags into one call of another folder and prints the result. This folder must not touch pixels,
files or models itself, and it alone imports typer and rich.
"""
