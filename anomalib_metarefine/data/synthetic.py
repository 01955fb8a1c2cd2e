"""Synthetic defects: good images made worse as a whole, where real defects are few.

Noise and blur have the strengths of severity 3 of 5 in Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019 (arXiv 1903.12261). Blur and rotation go by the image's
own size, so that they look alike at every resolution.
"""

from __future__ import annotations

import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp

import cv2
import numpy as np
from PIL import Image

NOISE_SIGMA = 46.0  # standard deviation in grey levels of 255
BLUR_SIGMA = 3 / 224  # standard deviation as a share of the shorter side
ROTATION = (15.0, 45.0)  # degrees, to either side


def add_noise(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise, the same to all channels: a grey image stays grey.

    Args:
        image (np.ndarray): ``[H x W x 3]`` of uint8.
        generator (np.random.Generator): Draws the noise.

    Returns:
        np.ndarray: ``[H x W x 3]`` of uint8.
    """
    noise = generator.normal(0, NOISE_SIGMA, (*image.shape[:2], 1))
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def blur(image: np.ndarray, _generator: np.random.Generator) -> np.ndarray:
    """Blur with a Gaussian, as a lens out of focus does.

    Args:
        image (np.ndarray): ``[H x W x 3]`` of uint8.
        _generator (np.random.Generator): Not used: nothing here is random.

    Returns:
        np.ndarray: ``[H x W x 3]`` of uint8.
    """
    return cv2.GaussianBlur(image, (0, 0), BLUR_SIGMA * min(image.shape[:2]))


def rotate(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Turn about the centre, as a misplaced part; what comes in at the edges is the image's own reflection.

    Args:
        image (np.ndarray): ``[H x W x 3]`` of uint8.
        generator (np.random.Generator): Draws angle and side.

    Returns:
        np.ndarray: ``[H x W x 3]`` of uint8.
    """
    height, width = image.shape[:2]
    angle = generator.uniform(*ROTATION) * generator.choice([-1, 1])
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
    return cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101)


DEFECTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": add_noise,
    "blur": blur,
    "rotation": rotate,
}


def write_defective(images: Sequence[str], numbers: Sequence[int], defect: str, seed: int, folder: Path) -> list[str]:
    """Write defective copies of images as PNG files.

    What a copy looks like depends on its image, its number, ``defect`` and ``seed``, and on no other image. A copy that
    is there already is not written again: somebody may be reading it.

    Args:
        images (Sequence[str]): Paths of N images.
        numbers (Sequence[int]): A number for each, which seeds its randomness and starts its name.
        defect (str): One of `DEFECTS`.
        seed (int): Not negative.
        folder (Path): Where the copies go, in a subfolder for ``defect`` and ``seed``.

    Returns:
        list[str]: Paths of the N copies.
    """
    folder = folder / f"{defect}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for image, number in zip(images, numbers, strict=True):
        # The checksum keeps images of one name in two folders apart.
        target = folder / f"{number:05d}_{Path(image).stem}_{zlib.crc32(str(image).encode()):08x}.png"
        if not target.exists():
            with Image.open(image) as opened:
                pixels = np.asarray(opened.convert("RGB"))  # as anomalib reads images
            worse = DEFECTS[defect](pixels, np.random.default_rng([seed, number]))
            Image.fromarray(worse).save(target, compress_level=1)  # noise does not compress, and takes long to try
        written.append(str(target))
    return written


class TemporaryFolder:
    """A folder outside the user's data that goes when its last owner goes.

    A deep copy is the same folder, so it stays until the last copy's end. What comes out of a pickle, in another
    process say, is a new and empty folder.

    Attributes:
        path (Path): The folder.
    """

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="anomalib_metarefine_"))
        weakref.finalize(self, _remove, self.path, os.getpid())

    def __deepcopy__(self, _memo: dict) -> TemporaryFolder:
        return self

    def __reduce__(self) -> tuple[type[TemporaryFolder], tuple[()]]:
        return TemporaryFolder, ()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker of a dataloader has its parent's objects, and must leave the files
        shutil.rmtree(folder, ignore_errors=True)
