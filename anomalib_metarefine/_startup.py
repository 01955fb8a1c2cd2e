"""Start-up hook: registers plugins with anomalib at the moment anomalib is imported.

anomalib finds models by subclass, and a subclass exists only once somebody has imported it; anomalib itself
reads no entry points. The one-line file ``anomalib_metarefine_plugins.pth`` makes ``site`` import this module
when Python starts. It imports nothing but what Python has loaded already, and puts a finder in front of
``sys.meta_path`` that waits for ``anomalib.models`` and ``anomalib.data``. When one of them has been executed,
every entry point of the group with the same name is loaded and made known to anomalib::

    [project.entry-points."anomalib.models"]
    MyModel = "my_package.models:MyModel"

    [project.entry-points."anomalib.data"]
    MyData = "my_package.data:MyData"

``ANOMALIB_PLUGINS=off`` in the environment switches all of it off.
"""

import sys

_GROUPS = ("anomalib.models", "anomalib.data")


class _AfterImport:
    """A ``sys.meta_path`` finder that runs ``register`` after one of ``_GROUPS`` has been executed."""

    def __init__(self):
        self._busy = set()

    def find_spec(self, name, path=None, target=None):
        """Let the other finders find ``name``; wrap the loader of the modules we wait for."""
        if name not in _GROUPS or name in self._busy:
            return None
        from importlib.util import find_spec

        self._busy.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            register(name)

        spec.loader.exec_module = exec_module
        return spec


def register(group):
    """Load the entry points of ``group`` and make them known to the anomalib module of that name.

    A model is set as ``anomalib.models.<name>`` and the package it comes from is added to anomalib's
    ``ALLOWED_MODULES``, so that ``class_path`` works in either spelling; a datamodule is set as
    ``anomalib.data.<name>``. A plugin that can't be loaded, or is no class, is reported as a warning and left
    out: anomalib itself must keep working. A plugin whose package is being imported right now can't be loaded
    yet; it is registered when something is first read from the anomalib module after that import.

    Args:
        group (str): ``"anomalib.models"`` or ``"anomalib.data"``.
    """
    from importlib.metadata import entry_points

    host = sys.modules[group]
    waiting = []
    for point in entry_points(group=group):
        if _being_imported(point):
            waiting.append(point)
        else:
            _register_one(host, point)
    if waiting:
        _register_later(host, waiting)


def _register_one(host, point):
    """Load one entry point and make it known, or warn."""
    import warnings

    try:
        plugin = point.load()
        if not isinstance(plugin, type):
            raise TypeError(f"expected a class, found {plugin!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin must not end the program of somebody else
        warnings.warn(
            f"anomalib plugin {point.name!r} ({point.value}) could not be loaded and is left out: {error!r}. "
            "Fix or uninstall its package, or set ANOMALIB_PLUGINS=off.",
            stacklevel=2,
        )
        return
    setattr(host, point.name, plugin)
    if hasattr(host, "ALLOWED_MODULES"):
        host.ALLOWED_MODULES |= {plugin.__module__, plugin.__module__.partition(".")[0]}


def _being_imported(point):
    """Whether any module of the package of ``point`` is half executed."""
    package = point.value.partition(":")[0].strip().partition(".")[0]
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(package + ".")
    )


def _register_later(host, waiting):
    """Register ``waiting`` at the first read from ``host`` that finds their packages complete."""
    plain = type(host)

    class Waiting(plain):
        def __getattribute__(self, name):
            # The import system reads names such as __spec__ and __path__ in the middle of an import.
            if not name.startswith("__"):
                ready = [point for point in waiting if not _being_imported(point)]
                waiting[:] = [point for point in waiting if point not in ready]
                for point in ready:  # out of the list first: loading them reads from the host again
                    _register_one(self, point)
                if not waiting and type(self) is Waiting:
                    self.__class__ = plain
            return plain.__getattribute__(self, name)

    host.__class__ = Waiting


def register_all():
    """Register every plugin now, for a Python that never ran the start-up hook (``python -S``, a zipped app)."""
    from importlib import import_module

    for group in _GROUPS:
        import_module(group)
        register(group)


if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
    sys.meta_path.insert(0, _AfterImport())
