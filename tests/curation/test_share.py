"""Decisions to and from other tools, by those tools' own loaders where they are installed."""

import inspect
import json
import xml.etree.ElementTree as Xml
from types import SimpleNamespace

import pandas as pd
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.cli import review as command
from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.decisions import decide
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.share import TOOLS, read, write
from anomalib_metarefine.images.answers import load
from tests.curation.made_up import ODD_NAMES, make


@pytest.fixture
def folder(tmp_path):
    manifest, evidence = make(tmp_path / "images", reject=6, names=ODD_NAMES)
    said = pd.DataFrame([["", ODD_NAMES[1], "keep"]], columns=["sha256", "image_path", "decision"])
    Curation(decide(manifest, said), evidence).write(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def manifest(folder):
    return Manifest.read(folder)


def test_the_command_knows_all_tools():
    assert sorted(TOOLS) == command._TOOLS


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_all_images_go_there_and_nothing_unchanged_comes_back(manifest, tmp_path, tool):
    file = write(manifest, tmp_path / "shared", tool)
    rows = manifest.table.set_index("image_path")
    expected = {ODD_NAMES[1]: "keep"} if tool == "label-studio" else rows.decision.to_dict()
    assert TOOLS[tool].read(file, manifest.root) == expected
    back = read(manifest, tmp_path / "shared", tool)
    assert back.image_path.tolist() == ([ODD_NAMES[1]] if tool == "label-studio" else [])
    with pytest.raises(ValueError, match="may hold somebody's work"):
        write(manifest, tmp_path / "shared", tool)


def relabelled(tool, file, name, label):
    """What the tool saves after a person chose another label for one image."""
    if tool == "cvat":
        tree = Xml.parse(file)
        next(i for i in tree.getroot().iter("image") if i.get("name") == name).find("tag").set("label", label)
        tree.write(file, encoding="utf-8")
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    if tool == "coco":
        image = next(image["id"] for image in content["images"] if image["file_name"] == name)
        category = next(c["id"] for c in content["categories"] if c["name"] == label)
        next(a for a in content["annotations"] if a["image_id"] == image)["category_id"] = category
    elif tool == "fiftyone":
        paths = json.loads(file.with_name("data.json").read_text(encoding="utf-8"))
        key = next(key for key, path in paths.items() if path.endswith(name))
        content["labels"][key]["label"] = label
    else:
        task = next(t for t in content if t.get("predictions") and name.split("/")[-1] in t["data"]["image"])
        task["annotations"] = [{"result": [task["predictions"][0]["result"][0] | {"value": {"choices": [label]}}]}]
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_what_a_person_changes_there_is_an_answer_here(folder, manifest, tmp_path, tool, capsys):
    assert main(["share", str(folder), str(tmp_path / "shared"), "--to", tool]) == 0
    file = tmp_path / "shared" / "labels.json" if tool == "fiftyone" else tmp_path / "shared"
    relabelled(tool, file, "good/00002.png", "reject")
    assert main(["share", str(folder), str(tmp_path / "shared"), "--from", tool]) == 0
    row = Manifest.read(folder).table.set_index("image_path").loc["good/00002.png"]
    assert (row.decision, row.decided_by) == ("reject", "user")
    assert load(folder)[row.sha256] == "reject"


def test_what_is_not_understood_is_named(manifest, tmp_path):
    file = write(manifest, tmp_path / "shared", "cvat")
    relabelled("cvat", file, "good/00002.png", "sideways")
    with pytest.raises(ValueError, match="labels that are not understood: sideways"):
        read(manifest, file, "cvat")
    file.write_text("{}")
    for tool in TOOLS:
        with pytest.raises(ValueError, match=f"can't be read as a file of {tool}"):
            read(manifest, file, tool)


def test_pycocotools_reads_it(manifest, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed.").COCO
    loaded = coco(write(manifest, tmp_path / "coco.json", "coco"))
    rejected = loaded.getImgIds(catIds=loaded.getCatIds(catNms=["reject"]))
    names = {image["file_name"] for image in loaded.loadImgs(rejected)}
    assert names == set(manifest.rows("reject").image_path)
    assert loaded.loadImgs(rejected)[0]["width"] == 32


def test_label_studio_accepts_the_tasks_and_the_view(manifest, tmp_path):
    pytest.importorskip("label_studio_sdk", reason="label-studio-sdk is not installed.")
    from label_studio_sdk.label_interface import LabelInterface

    from anomalib_metarefine.curation.share import LABEL_STUDIO_VIEW

    view = LabelInterface(LABEL_STUDIO_VIEW)
    view.validate()
    for task in json.loads(write(manifest, tmp_path / "tasks.json", "label-studio").read_text(encoding="utf-8")):
        assert not task.get("predictions") or view.validate_prediction(task["predictions"][0])
        assert not task.get("annotations") or view.validate_annotation(task["annotations"][0])


def test_fiftyone_reads_it_by_the_lines_that_are_printed(folder, manifest, tmp_path, capsys):
    """Its importer and its signatures; a data set of it needs MongoDB."""
    fiftyone = pytest.importorskip("fiftyone", reason="FiftyOne is not installed.")
    assert main(["share", str(folder), str(tmp_path / "out"), "--to", "fiftyone"]) == 0
    calls = {}

    class Images:
        def __getattr__(self, name):
            def call(*given, **named):
                inspect.signature(getattr(fiftyone.Dataset, name)).bind(
                    *([] if name == "from_dir" else [self]), *given, **named
                )
                calls[name] = named
                return self

            return call

    lines = capsys.readouterr().out.partition("import fiftyone as fo\n")[2]
    fo = SimpleNamespace(types=fiftyone.types, Dataset=Images(), launch_app=lambda images: SimpleNamespace(wait=int))
    exec(lines, {"fo": fo})
    assert list(calls) == ["from_dir", "sort_by", "save_view", "export"]
    settings = {name: calls["from_dir"][name] for name in ("dataset_dir", "data_path")}
    importer = calls["from_dir"]["dataset_type"]().get_dataset_importer_cls()(**settings)
    with importer:
        found = {path: (label.label, label.score) for path, _, label in importer}
    rows = manifest.table[manifest.table.decided_by != "unreadable"]
    assert found == {
        str(manifest.root / path): (decision, pytest.approx(score, abs=1e-4))
        for path, decision, score in rows[["image_path", "decision", "score"]].itertuples(index=False)
    }
