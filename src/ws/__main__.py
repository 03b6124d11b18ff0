"""`python -m ws` is the command `ws`."""

from ws.commands.cli import main

main()
