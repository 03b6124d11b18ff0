"""All steps up to a Direction: behaviour files, pairs of responses, judges, training, and the stages of a run."""
