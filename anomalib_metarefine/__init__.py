"""Anomaly detection from dirty training folders, as an anomalib plugin.

The names below are imported on first use, so ``import anomalib_metarefine`` takes a millisecond and the
start-up hook (see ``docs/registration.md``) costs next to nothing.

Example:
    >>> from anomalib.engine import Engine
    >>> from anomalib_metarefine import ELPV, Contaminated, MetaRefine
    >>> model = MetaRefine()  # doctest: +SKIP
    >>> datamodule = Contaminated(ELPV(cell_type="mono"), contamination=0.2, seed=0)  # doctest: +SKIP
    >>> Engine().train(model=model, datamodule=datamodule)  # doctest: +SKIP
"""

TYPE_CHECKING = False  # not from typing: that import alone would cost the start-up hook milliseconds
if TYPE_CHECKING:
    from anomalib_metarefine._startup import register_all as register
    from anomalib_metarefine.curation.curate import curate
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.data.contamination import Contaminated
    from anomalib_metarefine.data.elpv import ELPV
    from anomalib_metarefine.data.kolektor_sdd2 import KolektorSDD2
    from anomalib_metarefine.features.offline import use_offline_weights
    from anomalib_metarefine.model.lightning_model import MetaRefine

__version__ = "0.2.0"
__all__ = [
    "ELPV",
    "Contaminated",
    "KolektorSDD2",
    "Manifest",
    "MetaRefine",
    "curate",
    "register",
    "use_offline_weights",
]

_HOME = {
    "Contaminated": ("anomalib_metarefine.data.contamination", "Contaminated"),
    "Manifest": ("anomalib_metarefine.curation.manifest", "Manifest"),
    "curate": ("anomalib_metarefine.curation.curate", "curate"),
    "ELPV": ("anomalib_metarefine.data.elpv", "ELPV"),
    "KolektorSDD2": ("anomalib_metarefine.data.kolektor_sdd2", "KolektorSDD2"),
    "MetaRefine": ("anomalib_metarefine.model.lightning_model", "MetaRefine"),
    "register": ("anomalib_metarefine._startup", "register_all"),
    "use_offline_weights": ("anomalib_metarefine.features.offline", "use_offline_weights"),
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        msg = f"module 'anomalib_metarefine' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
