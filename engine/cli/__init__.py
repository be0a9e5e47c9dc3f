"""What a person types and sees: commands, their flags, progress, and everything that is printed.

It turns flags into one call of another folder and prints what comes back. It must not touch pixels, files or models
itself, and it alone imports typer and rich.
"""
