"""Contexts, Edits and Conditions, and how edits are put on a model and removed again."""
