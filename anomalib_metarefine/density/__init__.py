"""The density of patch embeddings: a position-conditioned normalizing flow and the scores read off it."""
