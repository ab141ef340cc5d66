"""A teacher's experts: how they are asked, who of them speaks, and what a student's gate chooses among."""
