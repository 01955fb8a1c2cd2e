"""The engine: scores, a rejection rule, the kept set, round by round."""

# As in `anomalib_metarefine.model`: the start-up hook must meet no half-imported module of this package.
import anomalib.models  # noqa: F401
