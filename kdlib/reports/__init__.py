"""HTML pages from a run's files.  Imports no torch."""
