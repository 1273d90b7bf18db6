"""A function as equations: its jaxpr as a straight line, and what each primitive does."""
