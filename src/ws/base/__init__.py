"""What every room may use: errors, messages, settings, random streams, statistics, files. Knows no model."""
