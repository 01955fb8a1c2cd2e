import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from anomalib_metarefine.cli import curation as cli
from anomalib_metarefine.cli import main
from anomalib_metarefine.curation.manifest import Manifest
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest

CURATION = "anomalib_metarefine.curation"


@pytest.fixture
def root(tmp_path):
    return make_files(tmp_path / "data")


@pytest.fixture
def out(root, tmp_path):
    """The output folder of a curation."""
    make_manifest(root, DECISIONS, dirty_probability=[0, 0, 0.4, 1, 0.5, 0.9]).write(tmp_path / "out")
    return tmp_path / "out"


def fails(capsys, *arguments, message):
    """Exit code 2, and one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metarefine: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from anomalib_metarefine.cli import main\ntry: main(['curate', '--help'])\nexcept SystemExit: pass"
    )
    code += "\nprint([m for m in ('torch', 'anomalib', 'pandas', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "--fail-above SHARE" in done.stdout


def test_demo_gets_its_settings(monkeypatch, tmp_path):
    asked = []
    fake = SimpleNamespace(DemoSettings=lambda **settings: settings, run_demo=asked.append)
    monkeypatch.setitem(sys.modules, "anomalib_metarefine.demo", fake)
    assert main(["demo", "--out", str(tmp_path), "--image-size", "64", "96", "--seeds", "1", "2"]) == 0
    expected = {"cell_type": "mono", "mvtec": None, "contamination": 0.2, "train_images": 300, "rule": "auto"}
    expected |= {"out": tmp_path, "image_size": (64, 96), "seeds": [1, 2], "training": ["raw", "refined", "clean"]}
    assert asked == [expected]


class TestCurate:
    @pytest.fixture
    def asked(self, root, monkeypatch):
        """What `curate` was called with, in place of the minutes it takes."""
        asked = []
        manifest = make_manifest(root, DECISIONS)

        def curate(data, **settings):
            asked.append((data, settings))
            evidence = SimpleNamespace(unusual_in=["left/1.png"])
            return SimpleNamespace(manifest=manifest, evidence=evidence, write=manifest.write)

        monkeypatch.setitem(sys.modules, f"{CURATION}.curate", SimpleNamespace(curate=curate))
        return asked

    def test_passes_on_what_was_asked(self, asked, root, tmp_path, capsys):
        arguments = ["curate", str(root), "--out", str(tmp_path / "out")]
        assert main(arguments) == 0
        defaults = {"root": None, "backbone": "tf_efficientnet_lite0", "image_size": None, "rule": "auto", "rounds": 4}
        defaults |= {"seed": 0, "batch_size": 32, "decisions": [], "quality": True}
        assert asked == [(str(root), defaults)]
        told = capsys.readouterr().out
        assert "2 of 6 images (33.3 %) were rejected, 2 need your eyes." in told
        assert "In 1 image some places look unusual. To have them replaced, in copies:\n  metarefine apply " in told
        assert f"{tmp_path / 'out'}: manifest.csv, run.json" in told
        said = tmp_path / "d.csv"
        said.write_text("image_path,decision\nright/4.png,keep\n")
        arguments += [
            "--image-size",
            "96",
            "64",
            "--extensions",
            "png",
            "dat",
            "--no-quality",
            "--decisions",
            str(said),
        ]
        assert main(arguments) == 0
        changed = {"image_size": (96, 64), "extensions": ("png", "dat"), "quality": False}
        # What the output folder remembers comes first: later decisions win.
        assert asked[1] == (str(root), defaults | changed | {"decisions": [tmp_path / "out", said]})
        assert "right/4.png,keep" in (tmp_path / "out" / "decisions.csv").read_text()

    def test_a_missing_file_of_decisions_costs_no_minutes(self, asked, root, tmp_path, capsys):
        fails(
            capsys,
            "curate",
            root,
            "--out",
            tmp_path / "out",
            "--decisions",
            tmp_path / "no.csv",
            message="no decisions",
        )
        assert asked == []

    @pytest.mark.parametrize(("share", "code"), [("0.33", 1), ("0.34", 0)])
    def test_fails_above_a_share(self, asked, root, tmp_path, capsys, share, code):
        assert main(["curate", str(root), "--out", str(tmp_path / "out"), "--fail-above", share]) == code
        assert ("33.3% rejected, more than --fail-above 33.0%" in capsys.readouterr().err) == bool(code)
        assert (tmp_path / "out" / "manifest.csv").exists()

    def test_a_share_that_is_none(self, asked, root, tmp_path, capsys):
        fails(capsys, "curate", root, "--out", tmp_path, "--fail-above", "5", message="a share in [0, 1], found 5")
        assert asked == []


class TestReview:
    def test_asks_and_takes_over(self, out, root, tmp_path, capsys):
        assert main(["review", str(out / "manifest.csv")]) == 0
        told = capsys.readouterr().out
        assert told.index("right/4.png") < told.index("left/2.png")
        table = pd.read_csv(out / "to_review.csv", dtype=str, keep_default_na=False)
        assert table.image_path.tolist() == ["right/4.png", "left/2.png"]
        table.assign(decision=["good", ""]).to_csv(out / "to_review.csv", index=False)
        fails(capsys, "review", out, message="may hold your answers")

        assert main(["review", str(out), "--decisions", str(out / "to_review.csv")]) == 0
        told = capsys.readouterr().out
        assert "1 decisions taken over" in told
        assert "2 of 6 images (33.3 %) were rejected, 1 needs your eyes." in told
        table = Manifest.read(out).table.set_index("image_path")
        assert table.loc["right/4.png", ["decision", "decided_by"]].tolist() == ["keep", "user"]
        assert (out / "decisions.csv").read_text().count("right/4.png,keep,") == 1

    def test_asks_what_helps_most(self, out, tmp_path, capsys):
        assert main(["review", str(out), "--budget", "3", "--out", str(tmp_path / "ask.csv")]) == 0
        assert pd.read_csv(tmp_path / "ask.csv").image_path.tolist() == ["right/4.png", "left/2.png", "left/0.png"]
        assert not (out / "to_review.csv").exists()
        fails(capsys, "review", out, "--budget", "0", message="at least 1 image")

    def test_asks_about_different_kinds_first(self, out, tmp_path, monkeypatch):
        evidence = SimpleNamespace(paths=["right/4.png", "left/2.png", "right/5.png"], groups=[3, 3, -1])
        loader = SimpleNamespace(load=lambda path: evidence)
        monkeypatch.setitem(sys.modules, f"{CURATION}.evidence", SimpleNamespace(Evidence=loader))
        (out / "evidence.npz").touch()
        # Gains 0.5, 0.4 / 2, less: one look at the kind does not make the other uninteresting here ...
        assert main(["review", str(out), "--budget", "3", "--out", str(tmp_path / "a.csv")]) == 0
        assert pd.read_csv(tmp_path / "a.csv").image_path.tolist() == ["right/4.png", "left/2.png", "left/0.png"]
        evidence.paths[2], evidence.groups[2] = "right/3.png", 3
        manifest = Manifest.read(out)
        manifest.table["dirty_probability"] = [0.3, 0, 0.4, 1, 0.5, 0.7]
        manifest.write(out)
        # ... but here: 0.5, 0.3, 0.4 / 2.
        assert main(["review", str(out), "--budget", "2", "--out", str(tmp_path / "b.csv")]) == 0
        assert pd.read_csv(tmp_path / "b.csv").image_path.tolist() == ["right/4.png", "left/0.png"]

    def test_changes_nothing_when_a_decision_is_unknown(self, out, tmp_path, capsys):
        before = (out / "manifest.csv").read_bytes()
        (tmp_path / "d.csv").write_text("image_path,decision\nleft/0.png,reject\nno.png,keep\n")
        fails(capsys, "review", out, "--decisions", tmp_path / "d.csv", message="not in the manifest: no.png")
        assert (out / "manifest.csv").read_bytes() == before
        assert not (out / "decisions.csv").exists()


class TestApply:
    def test_sorts(self, out, tmp_path, capsys):
        assert main(["apply", str(out), "--to", str(tmp_path / "to")]) == 0
        assert f"{tmp_path / 'to'}: 2 keep, 2 reject, 2 review." in capsys.readouterr().out
        assert (tmp_path / "to/reject/right/3.png").is_symlink()
        arguments = ["--to", str(tmp_path / "lists"), "--mode", "list", "--review", "keep"]
        assert main(["apply", str(out), *arguments]) == 0
        assert len((tmp_path / "lists" / "keep.txt").read_text().splitlines()) == 4

    def test_images_that_were_moved(self, out, root, tmp_path, capsys):
        root.rename(tmp_path / "moved")
        arguments = ["apply", out, "--to", tmp_path / "to"]
        fails(capsys, *arguments, message="6 missing")
        assert main([str(a) for a in arguments] + ["--root", str(tmp_path / "moved")]) == 0
        assert (tmp_path / "to/keep/left/0.png").read_bytes() == b"left/0.png"

    def test_bad_input(self, out, root, tmp_path, capsys):
        fails(capsys, "apply", out, "--to", root / "sorted", message="lies inside the folder of the images")
        fails(capsys, "apply", tmp_path / "no", "--to", tmp_path / "to", message="There is no ")


def test_diff(out, root, tmp_path, capsys):
    make_manifest(root, {**DECISIONS, "left/0.png": "reject"}).write(tmp_path / "later")
    assert main(["diff", str(out), str(out)]) == 0
    assert "The same images, and the same decisions." in capsys.readouterr().out
    assert main(["diff", str(out), str(tmp_path / "later" / "manifest.csv")]) == 1
    told = capsys.readouterr().out
    assert "left/0.png" in told
    assert "left/1.png" not in told
    fails(capsys, "diff", out, tmp_path / "no", message="There is no ")


def test_names_with_brackets_are_shown_as_they_are(capsys):
    cli._show(pd.DataFrame({"image_path": ["[bold]a[/].png", "[/x]"], "score": [1.0, 2.345]}), ["image_path", "score"])
    told = capsys.readouterr().out
    assert "[bold]a[/].png" in told
    assert "2.35" in told or "2.34" in told


def test_report(out, monkeypatch, capsys):
    written = []
    evidence = SimpleNamespace(Evidence=SimpleNamespace(load=lambda path: path.name))

    def write_report(manifest, evidence, path):
        written.append((manifest.counts["keep"], evidence, path))
        return path

    monkeypatch.setitem(sys.modules, f"{CURATION}.evidence", evidence)
    monkeypatch.setitem(sys.modules, f"{CURATION}.report", SimpleNamespace(write_report=write_report))
    for manifest in (out, out / "manifest.csv"):
        assert main(["report", str(manifest)]) == 0
    assert written == [(2, "evidence.npz", out / "report.html")] * 2
    assert str(out / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("meta_algorithm=reptile", "'reptile'"),
        ("meta_backend=jax", "'jax'"),
        ("meta_steps=many", "of type int"),
        ("steps=3", "found 'steps=3'"),
    ],
)
def test_settings_that_cannot_be_are_named_before_images_are_read(tmp_path, capsys, setting, message):
    nowhere = str(tmp_path / "nowhere")  # reading it would fail in another way
    assert main(["meta-train", "--data", nowhere, "--out", str(tmp_path / "x.ckpt"), "--settings", setting]) == 2
    assert message in capsys.readouterr().err
