"""The anomalib face: the exportable torch model and the Lightning module around it."""
