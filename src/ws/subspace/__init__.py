"""Where in the weights a direction lives."""
