"""Which of a teacher's answers are kept, and why the others are not."""
