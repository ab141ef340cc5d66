"""What a teacher is asked: templates × seeds, by category."""
