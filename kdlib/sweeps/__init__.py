"""Many runs over one base config: what differs, a pool that runs them, and a report over all."""
