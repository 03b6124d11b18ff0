"""`python -m ws.replicate` is the command `ws replicate`; nothing imports this."""

from ws.commands.cli import main_as

main_as("replicate")
