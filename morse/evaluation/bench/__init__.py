"""The benchmark: what is measured, with which methods, and how fast."""
