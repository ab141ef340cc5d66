"""Models: how they are loaded, what they say, and hooks into them."""
