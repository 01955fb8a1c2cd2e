"""The engine: scores, a rejection rule, the kept set, round by round; of numbers only, no files and no anomalib."""
