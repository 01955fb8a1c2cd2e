"""Features of a list of image files: decoded ahead in threads, one pass of the backbone, shard by shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.embedding import patch_embeddings
from anomalib_metarefine.features.executors import InProcess, advance
from anomalib_metarefine.features.shards import RUN, Shard
from anomalib_metarefine.features.store import NOT_FINITE, SHARD, FeatureStore, finite_half
from anomalib_metarefine.images.duplicates import THUMBNAIL
from anomalib_metarefine.images.quality import MOST_COMPARED, Descriptor, describe_file
from anomalib_metarefine.images.reading import ImageFile, read_image
from anomalib_metarefine.images.regions import looked_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anomalib_metarefine.features.executors import Executor, OnImages

_AHEAD = 2  # batches decoded ahead of the backbone
_RECORD = "embedded.json"  # written last: a shard with it is finished


class Recipe(NamedTuple):
    """How images become embeddings."""

    backbone: Backbone  # runs on a GPU where there is one
    name: str  # of it in timm, for the normalisation
    image_size: tuple[int, int]  # height and width
    batch_size: int = 32
    bit_depth: int | None = None  # see `read_image`
    ignored: np.ndarray | None = None  # mask of regions, see `looked_at`; places in them are not stored


class Features(NamedTuple):
    """What came of it."""

    store: FeatureStore  # images in the order of their paths
    grid: tuple[int, int]  # rows and columns of patches
    described: dict[str, Descriptor]  # by path, of all images that were looked at


class _Embedded(NamedTuple):
    """What a pass over the files of a shard gives back."""

    shard: Shard
    paths: list[str]  # of the images whose embeddings the shard has
    left_out: dict[str, str]  # images without finite features, and why
    shape: tuple[int, int]  # patches and channels
    grid: tuple[int, int]
    described: dict[str, Descriptor]


def collect_features(
    paths: Sequence[Path],
    recipe: Recipe,
    memory_limit_mb: float = 2048,
    executor: Executor | None = None,
    work: Path | None = None,
    on_images: OnImages = lambda _images: None,
) -> Features:
    """Read, resize and embed images, as `MetaRefine` does in training.

    Args:
        paths (Sequence[Path]): Image files.
        recipe (Recipe): How.
        memory_limit_mb (float): Past so many megabytes of features, shards are files of a temporary folder.
        executor (Executor | None): Runs it; ``None`` is in this process.
        work (Path | None): Folder for the shards, which all workers must see. What an earlier run with the same files
            and the same recipe finished there is taken over. ``None`` keeps no files.
        on_images (OnImages): Told how many images are done.

    Raises:
        ValueError: If no image can be read, or the features of none are finite.
    """
    executor = executor or InProcess()
    store, grid, described = FeatureStore(memory_limit_mb, executor), (0, 0), {}
    ordered = sorted(paths, key=str)
    parts = [ordered[i : i + SHARD] for i in range(0, len(ordered), SHARD)]
    if work is None and not executor.shares_memory:
        work = store.temporary()
    for left in work.glob(f"*/{RUN}*") if work else ():  # by a process that was killed
        shutil.rmtree(left)
    key = _key(recipe) if work else ""
    folders = [work / f"{key}-{_digest([_stamp(path) for path in part])}" if work else None for part in parts]

    def calls() -> Iterator[tuple[Shard, list[Path]]]:
        for folder, part in zip(folders, parts, strict=True):
            yield (Shard(folder) if folder else store.new_shard()), part

    for found in executor.map(_embed, calls(), recipe, on_images):
        if found.paths:
            store.append(found.shard, found.paths, found.shape)
            grid = found.grid
        store.left_out |= found.left_out
        if len(paths) > MOST_COMPARED:
            for image in found.described.values():
                image.thumbnail = None
        described |= found.described
    if len(store) == 0:
        if not store.left_out:
            msg = f"None of the {len(paths)} images can be read. The first is {ordered[0]} "
            raise ValueError(msg + f"({described[str(ordered[0])].unreadable}).")
        path, reason = next(iter(store.left_out.items()))
        msg = f"There is no image to learn from. The first is {path}: {reason}."
        raise ValueError(msg)
    store.key = _digest([str(folder) for folder in folders]) if work else ""
    return Features(store, grid, described)


@torch.no_grad()
def _embed(shard: Shard, recipe: Recipe, paths: list[Path]) -> _Embedded:
    """Embed the files of a shard, unless that is done."""
    record = shard.folder / _RECORD if shard.folder else None
    if record and record.exists():
        advance(len(paths))
        return _read(shard, record)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = recipe.backbone.to(device)
    mean, std = normalization(recipe.name)
    transform = Compose([Resize(recipe.image_size, antialias=True), Normalize(mean=list(mean), std=list(std))])
    described: dict[str, Descriptor] = {}

    def load(path: Path) -> torch.Tensor | None:
        described[str(path)], image = describe_file(path, recipe.bit_depth)
        return None if image is None else transform(_as_tensor(image))

    kept: list[str] = []
    left_out: dict[str, str] = {}
    embeddings, grid = [], (0, 0)
    for part, images in _batches(paths, load, recipe.batch_size):
        maps = backbone(images.to(device))
        grid = tuple(maps[-1].shape[-2:])
        patches = patch_embeddings(maps)
        if recipe.ignored is not None:
            patches = patches[:, torch.from_numpy(looked_at(recipe.ignored, grid)).to(device)]
        half, finite = finite_half(patches)
        embeddings.append(half)
        kept += [str(path) for path, ok in zip(part, finite, strict=True) if ok]
        left_out |= {str(path): NOT_FINITE for path, ok in zip(part, finite, strict=True) if not ok}
    shape = (0, 0)
    if kept:
        shape = tuple(embeddings[-1].shape[1:])
        shard.write(embeddings=torch.cat(embeddings).numpy())
    found = _Embedded(shard, kept, left_out, shape, grid, described)
    if record:
        _write(found, record)
    return found


def _write(found: _Embedded, record: Path) -> None:
    """All but the embeddings, beside them."""
    rows = [asdict(one) for one in found.described.values()]
    thumbnails = [row.pop("thumbnail") for row in rows]
    nothing = np.zeros((THUMBNAIL, THUMBNAIL), np.float32)
    found.shard.write(thumbnails=np.array([nothing if one is None else one for one in thumbnails]))
    for row in rows:
        row["levels"] = None if row["levels"] is None else row["levels"].tolist()
    fields = {name: getattr(found, name) for name in ("paths", "left_out", "shape", "grid")}
    partial = record.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**fields, "described": dict(zip(found.described, rows, strict=True))}))
    partial.replace(record)


def _read(shard: Shard, record: Path) -> _Embedded:
    fields = json.loads(record.read_text())
    thumbnails = shard.read("thumbnails")
    described = {}
    for (path, row), thumbnail in zip(fields["described"].items(), thumbnails, strict=True):
        readable = row["unreadable"] is None
        row["levels"] = np.array(row["levels"]) if readable else None
        described[path] = Descriptor(**row, thumbnail=thumbnail if readable else None)
    shape, grid = (tuple(fields[name]) for name in ("shape", "grid"))
    return _Embedded(shard, fields["paths"], fields["left_out"], shape, grid, described)


def _key(recipe: Recipe) -> str:
    """Of everything that embeddings depend on but the files."""
    weights = hashlib.sha256()
    for name, value in recipe.backbone.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    ignored = None if recipe.ignored is None else hashlib.sha256(np.packbits(recipe.ignored)).hexdigest()
    packages = [version(package) for package in ("anomalib-metarefine", "torch", "torchvision", "timm")]
    settings = [recipe.name, list(recipe.image_size), recipe.batch_size, recipe.bit_depth, ignored, SHARD]
    return _digest([weights.hexdigest(), *map(str, settings), *recipe.backbone.layers, *packages])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _stamp(path: Path) -> str:
    """Name, size and time of a file: another content has another one."""
    try:
        found = path.stat()
    except OSError:  # it is found to be unreadable later
        return str(path)
    return f"{path} {found.st_size} {found.st_mtime}"


def _batches(
    paths: Sequence[Path], load: Callable[[Path], torch.Tensor | None], batch_size: int
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Batches of the images that can be read; all are full but the last."""
    part: list[tuple[Path, torch.Tensor]] = []
    for path, image in _loaded(paths, load, _AHEAD * batch_size):
        advance(1)
        if image is not None:
            part.append((path, image))
        if len(part) == batch_size:
            yield [path for path, _ in part], torch.stack([image for _, image in part])
            part = []
    if part:
        yield [path for path, _ in part], torch.stack([image for _, image in part])


def _loaded(
    paths: Sequence[Path], load: Callable[[Path], torch.Tensor | None], ahead: int
) -> Iterator[tuple[Path, torch.Tensor | None]]:
    """In order, with at most ``ahead`` images loaded before they are asked for."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        try:
            for path in paths:
                waiting.append((path, pool.submit(load, path)))
                if len(waiting) > ahead:
                    first, loading = waiting.popleft()
                    yield first, loading.result()
            for path, loading in waiting:
                yield path, loading.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error in one image must not wait for the others


def image_tensor(path: str | Path, bit_depth: int | None = None) -> torch.Tensor:
    """An image file as a tensor ``[3 x H x W]`` in [0, 1], see `read_image`."""
    return _as_tensor(read_image(path, bit_depth))


def _as_tensor(image: ImageFile) -> torch.Tensor:
    return torch.from_numpy(image.pixels).permute(2, 0, 1)
