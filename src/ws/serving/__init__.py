"""A steered model in use, with a strength per request: chat, server, page, and other people's evaluations."""
