"""Decisions and scores to and from other tools: COCO, CVAT, FiftyOne and Label Studio.

Every writer lists all readable images with their decision and score; every reader answers what a file says of them.
Formats:
    COCO: https://cocodataset.org/#format-data; a box around the whole image, its category the decision.
    CVAT for images 1.1: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat; a tag.
    FiftyOneImageClassificationDataset: https://docs.voxel51.com/user_guide/import_datasets.html; ``labels.json`` and,
    beside it, ``data.json`` with the paths. `FIFTYONE_LINES` make fields and a saved view of it.
    Label Studio: https://labelstud.io/guide/tasks#Basic-Label-Studio-JSON-format; the rule's decisions are predictions,
    a person's are annotations. Files are served from ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``, the images' root.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import pandas as pd
from PIL import Image as Pillow

from anomalib_metarefine.curation.schema import DECISIONS
from anomalib_metarefine.images.answers import MEANING

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomalib_metarefine.curation.manifest import Manifest

LABEL_STUDIO_VIEW = (
    '<View><Image name="image" value="$image"/><Choices name="decision" toName="image">'
    '<Choice value="keep"/><Choice value="reject"/></Choices></View>'
)
FIFTYONE_LINES = """\
import fiftyone as fo
kind = {{"dataset_type": fo.types.FiftyOneImageClassificationDataset, "label_field": "decision"}}
images = fo.Dataset.from_dir(dataset_dir={folder!r}, data_path="data.json", dynamic=True, **kind)
images.save_view("most suspicious first", images.sort_by("decision.score", reverse=True))
fo.launch_app(images).wait()
images.export(export_dir={back!r}, export_media="manifest", **kind)"""


def write(manifest: Manifest, path: Path, tool: str) -> Path:
    """Write decisions and scores for another tool.

    Args:
        manifest (Manifest): Images that can't be read are left out.
        path (Path): The file; it must not exist. For FiftyOne the folder of ``labels.json``.
        tool (str): One of `TOOLS`.

    Raises:
        ValueError: If the file exists.
        FileNotFoundError: If an image has gone.
    """
    file = path / "labels.json" if tool == "fiftyone" else path
    if file.exists():
        msg = f"{file} exists, and may hold somebody's work. Pass another name."
        raise ValueError(msg)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = manifest.table[manifest.table.decided_by != "unreadable"].to_dict("records")
    TOOLS[tool].write(rows, manifest.root, file)
    return file


def read(manifest: Manifest, path: Path, tool: str) -> pd.DataFrame:
    """A person's decisions from what another tool has saved.

    What says the same as the manifest is no answer, since nobody need have looked at it. Label Studio alone tells
    predictions from annotations: there all annotations are answers.

    Args:
        manifest (Manifest): Whose images they are about.
        path (Path): The file, or the folder of FiftyOne's ``labels.json``.
        tool (str): One of `TOOLS`.

    Returns:
        pd.DataFrame: ``sha256``, ``image_path``, ``decision``, as `decisions.read` gives them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, or a label is not understood.
    """
    file = path / "labels.json" if tool == "fiftyone" and path.is_dir() else path
    try:
        labels = TOOLS[tool].read(file, manifest.root)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, Xml.ParseError) as error:
        msg = f"{file} can't be read as a file of {tool} ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    strange = sorted({label for label in labels.values() if label.lower() not in MEANING})
    if strange:
        msg = f"{file} has labels that are not understood: {', '.join(strange)}. Expected one of {', '.join(MEANING)}."
        raise ValueError(msg)
    table = manifest.table.set_index("image_path")
    found = [
        ("" if name not in table.index else table.sha256[name], name, MEANING[label.lower()])
        for name, label in labels.items()
        if MEANING[label.lower()] != "review"
        and (tool == "label-studio" or name not in table.index or MEANING[label.lower()] != table.decision[name])
    ]
    return pd.DataFrame(found, columns=["sha256", "image_path", "decision"])


Row = dict[str, Any]


def _number(value: float) -> float | None:
    return round(float(value), 4) if value == value else None  # NaN is no JSON  # noqa: PLR0124


def _dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _load(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text(encoding="utf-8"))


def _size(path: Path) -> tuple[int, int]:
    with Pillow.open(path) as image:
        return image.size


def _write_coco(rows: list[Row], root: Path, path: Path) -> None:
    images, annotations = [], []
    for number, row in enumerate(rows, 1):
        width, height = _size(root / row["image_path"])
        images.append({"id": number, "file_name": row["image_path"], "width": width, "height": height})
        annotations.append({
            "id": number,
            "image_id": number,
            "category_id": DECISIONS.index(row["decision"]) + 1,
            "bbox": [0, 0, width, height],
            "area": width * height,
            "segmentation": [],
            "iscrowd": 0,
            "score": _number(row["score"]),
        })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(DECISIONS, 1)]
    _dump(path, {"images": images, "annotations": annotations, "categories": categories})


def _read_coco(path: Path, _root: Path) -> dict[str, str]:
    content = _load(path)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    categories = {category["id"]: category["name"] for category in content["categories"]}
    return {names[entry["image_id"]]: categories[entry["category_id"]] for entry in content["annotations"]}


def _write_cvat(rows: list[Row], root: Path, path: Path) -> None:
    document = Xml.Element("annotations")
    Xml.SubElement(document, "version").text = "1.1"
    labels = Xml.SubElement(Xml.SubElement(Xml.SubElement(document, "meta"), "task"), "labels")
    for name in DECISIONS:
        label = Xml.SubElement(labels, "label")
        Xml.SubElement(label, "name").text = name
        attribute = Xml.SubElement(Xml.SubElement(label, "attributes"), "attribute")
        for key, value in {"name": "score", "mutable": "False", "input_type": "text"}.items():
            Xml.SubElement(attribute, key).text = value
    for number, row in enumerate(rows):
        width, height = map(str, _size(root / row["image_path"]))
        image = Xml.SubElement(document, "image", id=str(number), name=row["image_path"], width=width, height=height)
        source = "manual" if row["decided_by"] == "user" else "auto"
        tag = Xml.SubElement(image, "tag", label=row["decision"], source=source)
        Xml.SubElement(tag, "attribute", name="score").text = str(_number(row["score"]))
    Xml.indent(document)
    Xml.ElementTree(document).write(path, encoding="utf-8", xml_declaration=True)


def _read_cvat(path: Path, _root: Path) -> dict[str, str]:
    images = Xml.parse(path).getroot().iter("image")
    return {image.attrib["name"]: tag.attrib["label"] for image in images for tag in image.iter("tag")}


def _write_fiftyone(rows: list[Row], root: Path, path: Path) -> None:
    # FiftyOne takes what follows the last dot of a key for an extension, and drops it: so keys are numbers.
    keys = [f"{number:06d}" for number in range(len(rows))]
    labels = {
        key: {
            "label": row["decision"],
            "attributes": {"score": _number(row["score"]), "decided_by": row["decided_by"]},
        }
        for key, row in zip(keys, rows, strict=True)
    }
    _dump(path, {"classes": list(DECISIONS), "labels": labels})
    paths = {key: str(root / row["image_path"]) for key, row in zip(keys, rows, strict=True)}
    _dump(path.with_name("data.json"), paths)


def _read_fiftyone(path: Path, root: Path) -> dict[str, str]:
    content = _load(path)
    labels, classes = content["labels"], content.get("classes")
    paths, found = _load(path.with_name("data.json")), {}
    for key, target in labels.items():
        label = target["label"] if isinstance(target, dict) else target
        name = Path(paths[key]).relative_to(root).as_posix()
        found[name] = classes[label] if isinstance(label, int) else label
    return found


def _write_label_studio(rows: list[Row], _root: Path, path: Path) -> None:
    tasks = []
    for row in rows:
        choice = {
            "from_name": "decision", "to_name": "image", "type": "choices", "value": {"choices": [row["decision"]]},
        }  # fmt: skip
        data = {"image": f"/data/local-files/?d={quote(row['image_path'])}", "score": _number(row["score"])}
        task: dict[str, Any] = {"data": data}
        if row["decided_by"] == "user":
            task["annotations"] = [{"result": [choice]}]
        elif row["decision"] != "review":
            task["predictions"] = [{"result": [choice], "model_version": "metarefine"}]
        tasks.append(task)
    _dump(path, tasks)


def _read_label_studio(path: Path, _root: Path) -> dict[str, str]:
    found, tasks = {}, _load(path)
    if not isinstance(tasks, list):
        msg = "expected a list of tasks"
        raise TypeError(msg)
    for task in tasks:
        name = parse_qs(urlsplit(task["data"]["image"]).query)["d"][0]
        for annotation in task.get("annotations", []):  # the last one counts
            for result in annotation["result"]:
                if result["type"] == "choices" and not annotation.get("was_cancelled"):
                    found[name] = result["value"]["choices"][0]
    return found


class _Tool(NamedTuple):
    write: Callable[[list[Row], Path, Path], None]
    read: Callable[[Path, Path], dict[str, str]]


TOOLS = {
    "coco": _Tool(_write_coco, _read_coco),
    "cvat": _Tool(_write_cvat, _read_cvat),
    "fiftyone": _Tool(_write_fiftyone, _read_fiftyone),
    "label-studio": _Tool(_write_label_studio, _read_label_studio),
}
