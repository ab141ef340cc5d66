"""What the notebooks and `kd` call."""
