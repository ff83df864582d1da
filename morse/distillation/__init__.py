"""Losses that teach one network the features of another (torch only)."""
