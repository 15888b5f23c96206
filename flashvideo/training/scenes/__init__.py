"""Procedural videos with captions, and a judge of what they show."""
