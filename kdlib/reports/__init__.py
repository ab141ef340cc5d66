"""HTML pages from a run's files."""
