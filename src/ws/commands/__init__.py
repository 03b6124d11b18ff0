"""The commands, one dataclass each; `cli` puts them together."""
