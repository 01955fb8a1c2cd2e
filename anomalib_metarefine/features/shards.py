"""A shard: some hundred images one after the other, with all that is known of their patches."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

RUN = "run-"  # folders of what one run finds begin so


class Shard:
    """Arrays of some images by name, in memory or in a folder.

    Args:
        folder (Path | None): Where its files lie; ``None`` holds the arrays in memory.
        run (str): Folder in it of what one run finds; empty writes all into the folder itself.
    """

    def __init__(self, folder: Path | None = None, run: str = "") -> None:
        self.folder, self._run = folder, run
        self._arrays: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays if self.folder is None else self._found(name).exists()

    def read(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """An array, or some rows of it."""
        if self.folder is None:
            array = self._arrays[name]
        elif rows is None:
            return np.load(self._found(name), allow_pickle=False)
        else:
            array = np.load(self._found(name), mmap_mode="r", allow_pickle=False)
        return array if rows is None else np.asarray(array[rows])

    def write(self, lasting: bool = False, /, **arrays: np.ndarray) -> None:
        """Keep arrays, for this run or for later ones, too; a file is there as a whole or not at all."""
        if self.folder is None:
            self._arrays.update(arrays)
            return
        folder = self.folder if lasting else self.folder / self._run
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            partial = folder / f".{name}.{os.getpid()}.npy"
            np.save(partial, array)
            partial.replace(folder / f"{name}.npy")

    def fresh(self, run: str) -> Shard:
        """The same images, as another run finds them: nothing is known but their embeddings and what lasts."""
        shard = Shard(self.folder, run)
        if self.folder is None:
            shard.write(embeddings=self._arrays["embeddings"])
        return shard

    def forget(self) -> None:
        """Delete what the run found."""
        if self.folder is not None and self._run:
            shutil.rmtree(self.folder / self._run, ignore_errors=True)

    def _found(self, name: str) -> Path:
        own = self.folder / self._run / f"{name}.npy"
        return own if own.exists() else self.folder / f"{name}.npy"
