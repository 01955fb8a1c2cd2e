"""From checkpoint to line: what is beside the exported model, thresholds, inference, monitoring."""
