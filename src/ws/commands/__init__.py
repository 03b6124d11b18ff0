"""`ws <command>`: one thin dataclass per command, the options that they share, and failures as one line."""
