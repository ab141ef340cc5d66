"""The cost of a loss and of a training step, beside what other packages offer for the same job."""
