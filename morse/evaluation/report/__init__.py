"""The benchmark's report, drawn from its JSON alone."""
