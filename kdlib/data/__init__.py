"""Rows and batches."""
