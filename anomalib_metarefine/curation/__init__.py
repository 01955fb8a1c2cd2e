"""Which training images are dirty: rejection rules and the refinement loop."""
