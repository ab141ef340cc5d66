"""Other projects' settings as a config of ours."""
