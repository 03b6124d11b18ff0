"""The command line `ws COMMAND`: one small dataclass per command, shared options, and one-line error messages."""
