"""Students: of some of a teacher's layers, for other tokens, or from scratch."""
