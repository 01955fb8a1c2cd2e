"""The data sets of a benchmark: a datamodule of clean images, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule


@dataclass(frozen=True)
class DataSet:
    """One data set and how it is read."""

    name: str  # its name in the table
    class_path: str  # a datamodule of anomalib, or of a plugin, as anomalib's configurations name it
    init_args: dict[str, Any] = field(default_factory=dict)  # its arguments
    category: str = ""  # its category in the table; empty if it has none
    image_size: tuple[int, int] = (256, 256)  # height and width that images are resized to
    train_images: int | None = None  # size of the training set, dirty images included; None: as many as are good

    def datamodule(self, seed: int) -> AnomalibDataModule:
        """The datamodule of its clean images, without a validation split; ``seed`` draws ELPV's training images."""
        import anomalib.data

        # Not `get_datamodule`: lists among the arguments would reach the class as OmegaConf's own kind.
        name = self.class_path.rpartition(".")[2]
        if not hasattr(anomalib.data, name):
            msg = f"{self.name}: anomalib.data has no datamodule {name!r}. Check class_path in the configuration."
            raise ValueError(msg)
        datamodule = getattr(anomalib.data, name)(**self.init_args)
        if "seed" not in self.init_args:
            datamodule.seed = seed
        datamodule.val_split_mode = anomalib.data.utils.ValSplitMode.NONE  # some would take half of the test set
        return datamodule
