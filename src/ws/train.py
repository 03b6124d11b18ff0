"""`python -m ws.train` is the command `ws train`; nothing imports this."""

from ws.commands.cli import main_as

main_as("train")
