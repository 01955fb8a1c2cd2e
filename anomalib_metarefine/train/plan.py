"""What a run is asked to do, and what each of its steps leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from anomalib_metarefine.deploy.threshold import check_settings
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.settings import Settings

OURS = "MetaRefine"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Plan:
    """What a run is to do; it stays the same from call to call.

    Attributes:
        data (str | None): See `read_source`; ``None`` takes the images of the curation.
        curation (str | None): Output folder of `metarefine curate`; ``None`` curates.
        decisions (str | None): A person's decisions, for the curation.
        test (str | None): Labelled images to verify on, see `read_labelled`; ``None`` takes those of the curation.
        model (str): A name in ``anomalib.models``, or MetaRefine.
        init_args (dict[str, Any]): Arguments of its class.
        max_epochs (int | None): For models that don't know when to stop.
        backbone (str): timm architecture, of the curation and of models that take one.
        image_size (list[int] | None): Height and width; ``None`` takes what curation took.
        batch_size (int): Images at a time.
        seed (int): Of everything random.
        review (Literal["keep", "reject"]): Whether images that a person should look at are trained on.
        ignore (str | None): Regions to ignore, see `read_regions`; for models that can, see `ignore_regions`.
        false_alarm_rate (float): See `calibrate`.
        settings (dict[str, Any]): Of the curation and MetaRefine, see `Settings`.
    """

    data: str | None = None
    curation: str | None = None
    decisions: str | None = None
    test: str | None = None
    model: str = OURS
    init_args: dict[str, Any] = field(default_factory=dict)
    max_epochs: int | None = None
    backbone: str = OFFLINE_BACKBONE
    image_size: list[int] | None = None
    batch_size: int = 32
    seed: int = 0
    review: Literal["keep", "reject"] = "keep"
    ignore: str | None = None
    false_alarm_rate: float = 0.01
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Settings(**self.settings)
        check_settings(self.false_alarm_rate, CONFIDENCE)
        if not self.model.isidentifier():
            msg = f"model must be a name in anomalib.models, such as Patchcore, or {OURS}; found {self.model!r}."
            raise ValueError(msg)
        if self.data is None and self.curation is None:
            msg = "There is nothing to train on. Pass images, or the folder of a curation."
            raise ValueError(msg)
        if self.curation and (self.decisions or self.settings):
            msg = "A curation has its decisions and settings already. Run `metarefine curate` with them instead."
            raise ValueError(msg)


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        figures (dict[str, Any]): What came out.
        seconds (float): That it took.
        sha256 (str): Of the file it left; empty if there is none.
        decided (str): Hash of the decisions that it was done by.
    """

    figures: dict[str, Any]
    seconds: float
    sha256: str = ""
    decided: str = ""
