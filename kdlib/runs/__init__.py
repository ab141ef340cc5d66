"""A run's folder, its log, its progress."""
