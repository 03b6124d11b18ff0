"""Baselines and controls: other Edits and Contexts, measured by the same engine on the same rows."""
