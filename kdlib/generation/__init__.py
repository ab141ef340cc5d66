"""A teacher's answers as rows to learn from: prompts → teacher → log → filters → files."""
