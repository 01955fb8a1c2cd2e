"""anomalib's datamodules: made from their YAML, and set up whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule


def load_datamodule(path: str | Path) -> AnomalibDataModule:
    """Make a datamodule from its YAML file, as `anomalib train` does.

    With jsonargparse, not with `anomalib.data.get_datamodule`: that one hands a datamodule inside another's settings on
    as a dictionary.

    Args:
        path (str | Path): ``class_path`` and ``init_args``, at its top or under ``data``. Relative folders in it are
            relative to the working directory, as for anomalib's own commands.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not describe a datamodule.
    """
    import anomalib.data
    import yaml
    from jsonargparse import ArgumentParser

    if not Path(path).is_file():
        msg = f"There is no datamodule config {path}."
        raise FileNotFoundError(msg)
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        found = config.get("data", config)
        name = found["class_path"].rpartition(".")[2]
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        msg = f"{path} describes no datamodule. Expected `class_path` and `init_args`, at its top or under `data`."
        raise ValueError(msg) from error
    if not hasattr(anomalib.data, name):
        msg = f"{path}: anomalib knows no datamodule {found['class_path']}. Check the name, or register its package."
        raise ValueError(msg)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=anomalib.data.AnomalibDataModule)
    try:
        return parser.instantiate_classes(parser.parse_object({"data": found})).data
    except Exception as error:  # whatever the constructor of the named class raises is about this file
        msg = f"{path}: {found['class_path']} can't be made with these settings ({type(error).__name__}: {error})."
        raise ValueError(msg) from error


def set_up_without_validation(datamodule: AnomalibDataModule) -> AnomalibDataModule:
    """A copy whose training and test sets are whole: no validation set is taken out of either.

    Args:
        datamodule (AnomalibDataModule): Stays as it is.

    Raises:
        ValueError: If it can't be set up.
    """
    from anomalib.data.utils import ValSplitMode

    source = copy.copy(datamodule)  # not deep: after a training it holds the trainer, and setup makes new data sets
    source.val_split_mode = ValSplitMode.NONE
    source._is_setup = False  # after a training, setup would do nothing
    try:
        source.prepare_data()
        source.setup()
    except Exception as error:  # anomalib's own range from RuntimeError to KeyError
        msg = f"The datamodule {datamodule.name} can't be set up ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    return source
