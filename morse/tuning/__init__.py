"""Tuning a trained Dot on whole runs: on what the samples of its plans end in."""
