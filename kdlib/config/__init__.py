"""What is asked for: one run as typed, checked objects."""
