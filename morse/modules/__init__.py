"""Layers that a Dot may be built of, each from its own paper; torch only."""
