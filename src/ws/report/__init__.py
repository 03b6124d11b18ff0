"""Summary, figures and pages of a run. Every number is computed from the scores table."""
