"""`python -m ws.subspace` is the command `ws subspace`; nothing imports this."""

from ws.commands.cli import main_as

main_as("subspace")
