"""Image files before any model: where they are, what is in them, what is wrong with them."""
