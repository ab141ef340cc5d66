"""Teachers, students, and hooks into them."""
