"""Probes: what a Condition is asked. Each module makes `Probe` objects; `ws.measure.score` runs them."""
