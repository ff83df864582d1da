"""From measured cells to figures: intervals, curves, speed-ups, the lossless test."""
