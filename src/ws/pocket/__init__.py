"""The embedded models and random ones for smoke runs: tokenizer, corpus, training, checks, card."""
