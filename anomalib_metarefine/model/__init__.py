"""The anomalib face: the exportable torch model and the Lightning module around it."""

# Executed before any module of this package: the start-up hook can then load our entry points from a state in
# which none of them is half imported.
import anomalib.models  # noqa: F401
