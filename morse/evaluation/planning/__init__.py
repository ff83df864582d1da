"""Search for plans: which evaluations Dot makes, and where the timesteps lie."""
