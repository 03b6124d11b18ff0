"""The embedded model: the corpus with its planted traits, the training run, the checks."""
