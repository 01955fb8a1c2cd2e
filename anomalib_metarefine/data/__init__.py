"""Datamodules that anomalib lacks, and controlled contamination of any datamodule."""

# Executed before any module of this package: the start-up hook can then load our entry points from a state in
# which none of them is half imported.
import anomalib.data  # noqa: F401
