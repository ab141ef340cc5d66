"""Rows of questions, answers and conversations, in the forms in which people keep them."""
