"""The trainer, and what stops it in time."""
