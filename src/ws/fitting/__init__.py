"""Everything up to a Direction: behaviour files, pairs of responses, judges, training, and a run's stages."""
