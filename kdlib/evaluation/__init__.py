"""Teacher, student and baseline on the same rows."""
