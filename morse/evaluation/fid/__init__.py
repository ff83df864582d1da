"""`morse eval fid`: image sets, extractors, metrics, generation."""
