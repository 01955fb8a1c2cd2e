"""The density of patch embeddings: a position-conditioned normalizing flow and the scores read off it."""

# As in `anomalib_metarefine.model`: the start-up hook must meet no half-imported module of this package.
import anomalib.models  # noqa: F401
