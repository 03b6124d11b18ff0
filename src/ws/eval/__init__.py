"""Probes: the questions that measure a Condition. Each module makes `Probe` objects; `ws.measure.score` runs them."""
