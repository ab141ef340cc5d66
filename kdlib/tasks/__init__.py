"""One file per task: what it makes of data and models, and what its comparison adds."""
