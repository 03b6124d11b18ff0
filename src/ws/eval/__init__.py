"""Probes: what a Condition is asked. Each module makes `Probe` objects; `ws.score` runs them."""
