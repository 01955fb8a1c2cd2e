"""Datamodules that anomalib lacks, and controlled contamination of any datamodule."""
