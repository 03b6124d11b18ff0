"""Probes, the scoring engine with its short cuts, generation, and calibration of strengths."""
