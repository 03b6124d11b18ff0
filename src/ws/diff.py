"""`python -m ws.diff` is the command `ws diff`; nothing imports this."""

from ws.commands.cli import main_as

main_as("diff")
