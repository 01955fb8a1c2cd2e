"""The configuration of a benchmark: which models, on which data sets, how dirty."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.benchmark.table import TRAININGS
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anomalib_metarefine.benchmark.models import ModelSpec

_USUAL_TRAININGS = ("raw", "curated", "clean")
_CHOICES = {
    "trainings": TRAININGS,
    "protocols": ("replace", "add"),
    "overlaps": ("no-overlap", "overlap"),
}


@dataclass(frozen=True)
class Entry:
    """A model and the part of the grid that it is trained on."""

    spec: ModelSpec  # the model
    contamination: tuple[float, ...]  # shares of dirty training images, in [0, 1)
    trainings: tuple[str, ...]  # of `TRAININGS`


@dataclass(frozen=True)
class BenchConfig:
    """Everything that a benchmark runs: the product of its lists."""

    models: tuple[Entry, ...]  # what is trained
    data: tuple[DataSet, ...]  # what on; a category each
    seeds: tuple[int, ...] = (0, 1, 2)  # of the draw of images, of the curation and of the training
    backbone: str = OFFLINE_BACKBONE  # timm architecture that all models share, as far as they take one
    layers: tuple[str, ...] | None = ("blocks.2", "blocks.4")  # modules of it that are read
    protocols: tuple[str, ...] = ("replace",)  # how dirty images come into the training set; see `Contaminated`
    overlaps: tuple[str, ...] = ("no-overlap",)  # whether they leave the test set; see `Contaminated`

    @classmethod
    def read(cls, path: str | Path) -> BenchConfig:
        """Read a YAML file; ``docs/benchmark.md`` describes its keys.

        Args:
            path (str | Path): The file.

        Returns:
            BenchConfig: What it says.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a key is unknown or missing, or a value can't be used; it names the key.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"There is no configuration {path}. configs/bench/ has some to start from."
            raise FileNotFoundError(msg)
        try:
            content = _load(path)
            if isinstance(content, dict) and isinstance(content.get("models"), str):
                content["models"] = _load(path.parent / content["models"])
            return _config(content)
        except (ValueError, yaml.YAMLError) as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from error

    def select(
        self,
        models: Sequence[str] | None = None,
        data: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> BenchConfig:
        """A part of the grid: of models, data sets and seeds those named; ``None`` leaves all.

        Raises:
            ValueError: If a name is not there.
        """
        _known("model", models or (), [entry.spec.name for entry in self.models])
        _known("data set", data or (), sorted({one.name for one in self.data}))
        return replace(
            self,
            models=tuple(entry for entry in self.models if models is None or entry.spec.name in models),
            data=tuple(one for one in self.data if data is None or one.name in data),
            seeds=self.seeds if seeds is None else tuple(seeds),
        )

    def at(self, roots: Mapping[str, str]) -> BenchConfig:
        """The same with data sets that lie elsewhere.

        Args:
            roots (Mapping[str, str]): For some names of data sets, the folder to pass as ``root``.

        Raises:
            ValueError: If a name is not there.
        """
        _known("data set", roots, sorted({one.name for one in self.data}))
        moved = (
            replace(one, init_args=one.init_args | {"root": roots[one.name]}) if one.name in roots else one
            for one in self.data
        )
        return replace(self, data=tuple(moved))


def _load(path: Path) -> object:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _config(content: object) -> BenchConfig:
    keys = {"contamination", "only", "trainings", *(field.name for field in fields(BenchConfig))}
    content = _mapping("the file", content, keys)
    given = {name: tuple(_list(name, value)) for name, value in content.items() if name in _CHOICES | {"seeds": ()}}
    grid = {
        "contamination": _shares("contamination", content.get("contamination", [0.0, 0.2, 0.4])),
        "trainings": given.pop("trainings", _USUAL_TRAININGS),
    }
    if "layers" in content:
        given["layers"] = None if content["layers"] is None else tuple(_list("layers", content["layers"]))
    if "backbone" in content:
        given["backbone"] = str(content["backbone"])
    models = _mapping("models", content.get("models"))
    only = _mapping("only", content.get("only", {}), empty=True)
    for share, names in only.items():
        _known("share of contamination", [share], grid["contamination"])
        _known("model", _list(f"only: {share}", names), list(models))
    data = _mapping("data", content.get("data"))
    return BenchConfig(
        models=tuple(_model(name, entry or {}, grid, only) for name, entry in models.items()),
        data=tuple(one for name, entry in data.items() for one in _data_sets(name, entry or {})),
        **given,
    )


def _model(name: str, entry: object, grid: Mapping[str, tuple], only: Mapping[float, Sequence[str]]) -> Entry:
    from anomalib_metarefine.benchmark.models import ModelSpec

    where = f"models: {name}"
    own = {field.name for field in fields(ModelSpec)} - {"name"}
    entry = dict(_mapping(where, entry, own | {"trainings"}, empty=True))
    shares = tuple(share for share in grid["contamination"] if name in only.get(share, [name]))
    trainings = tuple(_list("trainings", entry.pop("trainings", grid["trainings"]), where))
    init_args = _mapping(f"{where}: init_args", entry.pop("init_args", {}), empty=True)
    spec = ModelSpec(name=name, class_path=entry.pop("class_path", name), init_args=dict(init_args), **entry)
    return Entry(spec, shares, trainings)


def _data_sets(name: str, entry: object) -> Iterable[DataSet]:
    """One data set for every combination of what the arguments list under ``grid``, as `anomalib benchmark` has it."""
    from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

    where = f"data: {name}"
    own = {field.name for field in fields(DataSet)} - {"name", "category"}
    entry = dict(_mapping(where, entry, own))
    arguments = _mapping(f"{where}: init_args", entry.pop("init_args", {}), empty=True)
    size = _list("image_size", entry.pop("image_size", DataSet.image_size), where)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        msg = f"{where}: image_size must be height and width in pixels, found {size}."
        raise ValueError(msg)
    for made in get_iterator_from_grid_dict({"init_args": arguments}) if arguments else [{"init_args": {}}]:
        category = str(made["init_args"].get("category", ""))
        yield DataSet(
            name,
            entry.get("class_path", name),
            made["init_args"],
            category,
            tuple(size),
            entry.get("train_images"),
        )


def _mapping(where: str, value: object, keys: set[str] | None = None, *, empty: bool = False) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not (value or empty):
        found = "nothing" if value in (None, {}) else repr(value)
        msg = f"{where} must be a mapping of names to values, found {found}."
        raise ValueError(msg)
    if keys is not None:
        _known(f"key of {where}", value, sorted(keys))
    return value


def _list(name: str, value: object, where: str = "") -> list:
    full = f"{where}: {name}" if where else name
    if not isinstance(value, (list, tuple)) or not value:
        msg = f"{full} must be a list, found {value!r}."
        raise ValueError(msg)
    if name in _CHOICES:
        _known(f"value of {full}", value, _CHOICES[name])
    if name == "seeds" and not all(isinstance(seed, int) and seed >= 0 for seed in value):
        msg = f"{full} must be integers of at least 0, found {value}."
        raise ValueError(msg)
    return list(value)


def _shares(where: str, value: object) -> tuple[float, ...]:
    found = _list(where, value)
    if not all(isinstance(share, (int, float)) and 0 <= share < 1 for share in found):
        msg = f"{where} must be shares in [0, 1), found {found}."
        raise ValueError(msg)
    return tuple(float(share) for share in found)


def _known(what: str, found: Iterable[str], known: Sequence[str]) -> None:
    for name in found:
        if name not in known:
            msg = f"There is no {what} {name!r}. Choose from {', '.join(map(str, known))}."
            raise ValueError(msg)
