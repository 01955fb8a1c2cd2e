"""From the line back: a person's verdicts become an update, and a replay shows what it would have changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib_metarefine.images.hashes import file_sha256
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.update import known_images, threshold_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anomalib.models import AnomalibModule


class Verdicts(NamedTuple):
    """What a person's verdicts ask of an update; the first three as `update` takes them.

    Attributes:
        add (list[str]): Images called normal that the model does not know.
        forget (list[str]): Training images called defective.
        answers (dict[str, bool]): True for the images to add and for known ones called normal.
        noted (list[str]): Images called defective that the model never knew: nothing to forget.
        gone (list[str]): Images called normal that are no longer where they were.
    """

    add: list[str]
    forget: list[str]
    answers: dict[str, bool]
    noted: list[str]
    gone: list[str]


@dataclass(frozen=True)
class Replay:
    """Decisions of a line, and those of a model on the same images.

    Attributes:
        images (int): Of the line that had a score.
        rescored (int): Those scored anew, as their files are still there; for the others the old score counts.
        now_normal (list[str]): Were anomalous.
        now_anomalous (list[str]): Were normal.
    """

    images: int
    rescored: int
    now_normal: list[str]
    now_anomalous: list[str]


def read_verdicts(
    model: AnomalibModule, verdicts: Iterable[tuple[str, str, bool]], results: Iterable[Mapping[str, Any]] = ()
) -> Verdicts:
    """Sort a person's verdicts by what they ask for.

    Args:
        model (AnomalibModule): A trained MetaRefine.
        verdicts (Iterable[tuple[str, str, bool]]): Path and SHA-256 of an image, one of them perhaps empty, and whether
            it is normal.
        results (Iterable[Mapping[str, Any]]): Lines of `metarefine watch`, which know paths by SHA-256.
    """
    path_of = {line["sha256"]: line["path"] for line in results if line.get("sha256")}
    found = Verdicts([], [], {}, [], [])
    for path, sha256, normal in verdicts:
        name = path_of.get(sha256) or path or sha256
        try:
            known = list(known_images(model, [sha256 or path]))
        except ValueError:
            known = []
        if known and normal:
            found.answers.update(dict.fromkeys(known, True))
        elif known:
            found.forget.extend(known)
        elif not normal:
            found.noted.append(name)
        elif not Path(name).is_file():
            found.gone.append(name)
        else:
            found.add.append(name)
            found.answers[name] = True
    return found


def replay(model: AnomalibModule, results: Iterable[Mapping[str, Any]], progress: bool = False) -> Replay:
    """What a model would have decided on the images of a line.

    Args:
        model (AnomalibModule): A trained model, e.g. after an update.
        results (Iterable[Mapping[str, Any]]): Lines of `metarefine watch`.
        progress (bool): Show a bar.
    """
    lines = [line for line in results if line.get("raw_score") is not None]
    there = [line["path"] for line in lines if file_sha256(line["path"]) == line["sha256"]]
    again = dict(zip(there, raw_scores(model, there, progress).image, strict=True)) if there else {}
    threshold, now_normal, now_anomalous = threshold_of(model), [], []
    for line in lines:
        before, after = line["raw_score"] > line["threshold"], again.get(line["path"], line["raw_score"]) > threshold
        if before != after:
            (now_normal if before else now_anomalous).append(line["path"])
    return Replay(len(lines), len(again), now_normal, now_anomalous)
