"""Training Dash and Dot."""
