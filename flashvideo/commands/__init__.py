"""The commands of `python -m flashvideo`."""
