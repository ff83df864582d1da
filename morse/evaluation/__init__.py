"""Measuring quality and speed."""
