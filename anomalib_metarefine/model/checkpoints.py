"""Checkpoints of trained models: read without running anything that is in them, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anomalib.models
import torch
from anomalib.models import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals

from anomalib_metarefine.features.offline import no_pretrained_weights
from anomalib_metarefine.model.ignoring import Ignoring
from anomalib_metarefine.model.make import model_class

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning import Trainer

KEY = "metarefine"  # of a checkpoint: all that this package adds to anomalib's own
FORMAT = 5  # of what stands under it; no other is read

# Lightning takes hyper-parameters from all of these, the last two for checkpoints of before 2020.
_HYPER_PARAMETERS = ("hyper_parameters", "hparams", "module_arguments")
_IMPORTING = ("_instantiator", "_class_path", "class_path")  # keys that name what is to be imported and called


def additions(model: AnomalibModule) -> dict[str, Any]:
    """What this package keeps in a checkpoint, under `KEY`; most of it only MetaRefine has.

    Args:
        model (AnomalibModule): Its class and its ``calibration``, ``provenance``, ``refinement``, ``training_images``
            (SHA-256 by path), ``left_out_scores`` (of all training images), ``memory`` and the regions that it ignores
            are kept.
    """
    refinement, memory = getattr(model, "refinement", None), getattr(model, "memory", None)
    return {
        "format": FORMAT,
        "model": type(model).__name__,
        "calibration": getattr(model, "calibration", None),
        "provenance": getattr(model, "provenance", {}),
        "refinement": refinement.to_dict() if refinement else None,
        "training_images": getattr(model, "training_images", {}),
        "left_out_scores": getattr(model, "left_out_scores", []),
        "ignored": model.model.ignored.cpu() if isinstance(getattr(model, "model", None), Ignoring) else None,
        "memory": memory.to_dict() if memory else None,
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, checked before Lightning sees it.

    Args:
        path (str | Path): A checkpoint of Lightning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, needs code of its own to load, names a class to import in its
            hyper-parameters, or was written in another format than `FORMAT`.
    """
    if not Path(path).is_file():
        msg = f"There is no checkpoint {path}."
        raise FileNotFoundError(msg)
    try:
        with anomalib_safe_globals(extra=_safe_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not the text of torch's own error: it advises to load without `weights_only`, which runs code in the file.
        msg = (
            f"{path} is not a checkpoint that can be read: it is damaged, no checkpoint at all, or holds objects other "
            f"than tensors and plain data, which are not loaded because that may run code ({type(error).__name__})."
        )
        raise ValueError(msg) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        msg = f"{path} is not a checkpoint of a trained model: it holds no state_dict."
        raise ValueError(msg)
    for section in _HYPER_PARAMETERS:
        found = _importing(content.get(section))
        if found:
            msg = (
                f"{path} is refused: its hyper-parameters name {found} to import and run when it is loaded. No model "
                "of anomalib writes such a checkpoint. Train the model again, or ask for it where it comes from."
            )
            raise ValueError(msg)
    check_format(content, path)
    return content


def check_format(content: dict[str, Any], path: str | Path = "The checkpoint") -> None:
    """Refuse a checkpoint in which this package's part has another format than `FORMAT`.

    Raises:
        ValueError: If it has.
    """
    if KEY not in content:
        return
    found = content[KEY].get("format", 1) if isinstance(content[KEY], dict) else "unknown"
    if found != FORMAT:
        msg = (
            f"{path} has format {found} of MetaRefine's checkpoints, and this version of anomalib-metarefine reads "
            f"format {FORMAT} only. Train the model again, or use the version that wrote it."
        )
        raise ValueError(msg)


def load_checkpoint(path: str | Path, model: str | None = None) -> AnomalibModule:
    """A trained model, ready to score, without a look at a model hub: all weights are in the checkpoint.

    Args:
        path (str | Path): The checkpoint.
        model (str | None): Name of the class in `anomalib.models`; ``None`` takes the one that the checkpoint names,
            which those of MetaRefine and those that `metarefine calibrate` has written do.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: See `read_checkpoint`; and if it is not a checkpoint of a trained model of that class.
    """
    content = read_checkpoint(path)
    kept = content.get(KEY, {})
    cls = _model_class(path, kept.get("model"), model)
    try:
        with no_pretrained_weights():
            loaded = cls.load_from_checkpoint(path, map_location="cpu")
    except Exception as error:  # whatever Lightning and the model raise for another model's file
        msg = f"{path} is not a checkpoint of {cls.__name__} that this version reads: {_first_line(error)}"
        raise ValueError(msg) from error
    if hasattr(loaded, "_is_fitted") and not loaded._is_fitted:
        msg = f"The model in {path} has not been trained."
        raise ValueError(msg)
    if not hasattr(loaded, "calibration"):
        loaded.calibration, loaded.provenance = kept.get("calibration"), kept.get("provenance", {})
        loaded.training_images = kept.get("training_images", {})
    if kept.get("ignored") is not None:
        loaded.model = Ignoring(loaded.model, kept["ignored"])
    return loaded.eval()


def save_checkpoint(trainer: Trainer, model: AnomalibModule, path: str | Path) -> None:
    """Lightning's checkpoint of a trained model with our `additions`, whatever model it is."""
    trainer.save_checkpoint(path)
    content = read_checkpoint(path)
    content[KEY] = additions(model)
    torch.save(content, path)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file that comes into being whole, at the end, or not at all; and never in place of another.

    That it can be written is found out on entry, before hours of work and not after.

    Args:
        path (str | Path): It must not exist; its folder is made if need be.

    Yields:
        Path: A temporary file beside it to write to.

    Raises:
        FileExistsError: If it exists, on entry or by the end.
        OSError: If it can't be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        msg = f"{path} exists. Name another file; nothing is overwritten."
        raise FileExistsError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        try:
            path.hardlink_to(temporary)  # unlike a rename, it fails where somebody has been quicker
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _safe_types() -> list[Any]:
    """Types that anomalib's models keep in their hyper-parameters."""
    classes = (value for value in vars(anomalib.models).values() if isinstance(value, type))
    models = (cls for cls in classes if issubclass(cls, AnomalibModule))
    return [kind for model in models for kind in model.checkpoint_safe_globals()]


def _importing(value: Any) -> str | None:  # noqa: ANN401
    """The first thing that hyper-parameters ask to import, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            found = f"{key} {item!r}" if key in _IMPORTING else _importing(item)
            if found:
                return found
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := _importing(item))), None)
    return None


def _model_class(path: str | Path, kept: str | None, wanted: str | None) -> type[AnomalibModule]:
    name = (wanted or kept or "").rpartition(".")[2]
    if kept and wanted and name != kept:
        msg = f"{path} is a checkpoint of {kept}, not of {wanted}."
        raise ValueError(msg)
    if not name:
        msg = f"{path} does not say which model it is of. Pass its name, e.g. --model Patchcore."
        raise ValueError(msg)
    from anomalib_metarefine import MetaRefine

    return MetaRefine if name == MetaRefine.__name__ else model_class(name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
