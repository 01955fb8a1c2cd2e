"""Models of others that the benchmark compares with, and anomalib does not have as they are needed."""
