"""A token as a person can see it.  Imports no torch."""


def visible(text: str) -> str:
    """A token with its white space and control characters to be seen."""
    return (
        "".join(
            {" ": "·", "\n": "⏎", "\t": "→"}.get(c, c if c.isprintable() else f"\\x{ord(c):02x}")
            for c in text
        )
        or "∅"
    )
