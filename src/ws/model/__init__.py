"""Load a model, render conversations for it, name its parts, and run it forward."""
