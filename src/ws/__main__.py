"""`python -m ws` is the command `ws`."""

from ws.cli import main

main()
