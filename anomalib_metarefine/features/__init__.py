"""Frozen backbone features: weights, patch embeddings, whitening and the feature store."""
