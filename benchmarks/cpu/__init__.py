"""How near the layer comes to what this machine's CPU can do: ``python -m benchmarks.cpu``."""
