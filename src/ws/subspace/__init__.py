"""Alignment of a direction with the singular directions of the weights."""
