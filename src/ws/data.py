"""`python -m ws.data` is the command `ws data`; nothing imports this."""

from ws.commands.cli import main_as

main_as("data")
