"""Load a model, find its linear maps, render conversations for it, and run its forward pass."""
