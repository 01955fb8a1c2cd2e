"""The density of patch embeddings: Gaussians of places, a normalizing flow, and what scores by them."""
