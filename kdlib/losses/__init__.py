"""Divergences between student and teacher, and how they are evaluated."""
