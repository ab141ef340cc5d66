"""What a step cost, and what went wrong with it."""
