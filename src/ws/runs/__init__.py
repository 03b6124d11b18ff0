"""Whole runs: replicate, measure further, sweep over families and seeds, and what the edited model says."""
