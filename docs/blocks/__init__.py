"""What docs/update.py writes between `begin` and `end` comments, from stored results alone."""
