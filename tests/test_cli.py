import shlex
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pandas as pd
import pytest

from anomalib_metarefine.cli import curation as cli
from anomalib_metarefine.cli import main
from anomalib_metarefine.cli.command import show
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review import finish  # noqa: F401  (whole, before tests replace what it imports)
from anomalib_metarefine.curation.run_folder import read_run
from tests.curation.test_evidence import make_evidence
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest

CURATION = "anomalib_metarefine.curation"


@pytest.fixture
def root(tmp_path):
    return make_files(tmp_path / "data")


@pytest.fixture
def out(root, tmp_path):
    """The output folder of a curation."""
    make_manifest(root, DECISIONS, score=[0, 0.1, 0.4, 5, 0.5, 4]).write(tmp_path / "out")
    return tmp_path / "out"


def fails(capsys, *arguments, message):
    """Exit code 2, and one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metarefine: ")
    assert error.count("\n") == 1
    assert message in error


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
        defaults = {"root": None, "backbone": "tf_efficientnet_lite0", "image_size": None}
        defaults |= {"seed": 0, "batch_size": 32, "decisions": [tmp_path / "out"], "quality": True}
        defaults |= {"bit_depth": None, "ignore": None, "engine": "local", "workers": None, "address": None}
        defaults |= {"gpus_per_worker": 0, "work": None}
        assert asked == [(str(root), defaults)]
        told = capsys.readouterr().out
        assert "2 of 6 images (33.3 %) were rejected, and 2 more are doubtful." in told
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
        [line] = (tmp_path / "out" / "decisions.csv").read_text().splitlines()[1:]
        assert line.startswith("right/4.png,")
        assert ",keep," in line

    def test_takes_every_setting(self, asked, root, tmp_path, capsys):
        arguments = ["curate", root, "--out", tmp_path / "out", "--settings", "shrinkage=0.1", "rounds=3"]
        assert main([str(argument) for argument in [*arguments, "--rounds", "2", "--rule", "iqr"]]) == 0
        found = {name: asked[0][1].get(name) for name in ("shrinkage", "rounds", "rule")}
        assert found == {"shrinkage": 0.1, "rounds": 2, "rule": "iqr"}
        fails(capsys, *arguments, "--rounds", "some", message="rounds must be a whole number of at least 0")
        fails(capsys, *arguments[:-2], "tail=2", message="tail must be a number in (0, 1], found 2")
        assert len(asked) == 1

    def test_into_an_address(self, asked, root, capsys):
        pytest.importorskip("upath")
        out = f"memory://{uuid.uuid4().hex}/run"
        assert main(["curate", str(root), "--out", out]) == 0
        told = capsys.readouterr().out
        assert f"{out}: manifest.csv, run.json" in told
        assert f"metarefine apply {out} --to DIR --mode copy" in told
        assert len(Manifest.read(out).table) == 6

    def test_an_address_that_cannot_be_written_to_costs_no_minutes(self, asked, root, tmp_path, capsys):
        pytest.importorskip("upath")
        said = tmp_path / "d.csv"
        said.write_text("image_path,decision\n")
        fails(
            capsys, "curate", root, "--out", "memory://a/b", "--decisions", said,
            message="remembered in a folder of this machine, not in memory://a/b",
        )  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(["curate", str(root), "--out", "nowhere://a"])
        assert "no address that can be opened" in capsys.readouterr().err
        assert not asked

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

    def test_what_can_t_be_is_noticed_before_the_work(self, asked, root, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        fails(capsys, "curate", root, "--out", tmp_path / "file" / "out", message="Can't write to")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "decisions.csv").write_text("sha256\nabc\n")
        fails(capsys, "curate", root, "--out", tmp_path / "out", message="decisions.csv needs a column decision")
        fails(capsys, "curate", tmp_path / "no", "--out", tmp_path / "new", message="no. Expected a folder of images")
        assert asked == []
        assert not (tmp_path / "new").exists()

    def test_hints_can_be_copied_into_a_shell(self, asked, root, tmp_path, capsys):
        assert main(["curate", str(root), "--out", str(tmp_path / "line 7; echo")]) == 0
        hint = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  metarefine apply"))
        assert shlex.split(hint) == [
            "metarefine",
            "apply",
            str(tmp_path / "line 7; echo"),
            *["--to", "DIR", "--mode", "repair"],
        ]

    def test_ctrl_c_is_one_line(self, root, tmp_path, capsys, monkeypatch):
        def curate(*_arguments, **_settings):
            raise KeyboardInterrupt

        monkeypatch.setitem(sys.modules, f"{CURATION}.curate", SimpleNamespace(curate=curate))
        assert main(["curate", str(root), "--out", str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err == "metarefine: stopped by Ctrl-C.\n"

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
        assert main(["review", str(out / "manifest.csv"), "--table"]) == 0
        told = capsys.readouterr().out
        assert told.index("right/4.png") < told.index("left/2.png")
        table = pd.read_csv(out / "to_review.csv", dtype=str, keep_default_na=False)
        assert table.image_path.tolist() == ["right/4.png", "left/2.png"]
        table.assign(decision=["good", ""]).to_csv(out / "to_review.csv", index=False)
        fails(capsys, "review", out, "--table", message="may hold your answers")

        assert main(["review", str(out), "--decisions", str(out / "to_review.csv")]) == 0
        told = capsys.readouterr().out
        assert "Taken over: 1 keep, 0 reject; remembered in " in told
        assert "2 of 6 images (33.3 %) were rejected, and 1 more is doubtful." in told
        table = Manifest.read(out).table.set_index("image_path")
        assert table.loc["right/4.png", ["decision", "decided_by"]].tolist() == ["keep", "user"]
        assert (out / "decisions.csv").read_text().count("right/4.png,") == 1

    def test_an_empty_queue_writes_no_file(self, root, tmp_path, capsys):
        make_manifest(root, dict.fromkeys(DECISIONS, "keep")).write(tmp_path / "out")
        assert main(["review", str(tmp_path / "out"), "--table"]) == 0
        assert "nothing to ask about; no file was written" in capsys.readouterr().out
        assert not (tmp_path / "out" / "to_review.csv").exists()

    def test_the_report_says_what_the_manifest_says(self, root, tmp_path):
        out = tmp_path / "with evidence"
        make_manifest(root, DECISIONS).write(out, {"evidence.npz": make_evidence().save})
        (tmp_path / "d.csv").write_text("image_path,decision\nright/4.png,n.i.O.\n")
        assert main(["review", str(out), "--decisions", str(tmp_path / "d.csv")]) == 0
        assert "3 of 6 images (50\u00a0%) were rejected" in (out / "report.html").read_text()
        assert read_run(out / "report.html")["counts"]["reject"] == 3

    def test_asks_about_the_highest_scores(self, out, tmp_path, capsys):
        assert main(["review", str(out), "--budget", "3", "--out", str(tmp_path / "ask.csv")]) == 0
        assert pd.read_csv(tmp_path / "ask.csv").image_path.tolist() == ["right/3.png", "right/5.png", "right/4.png"]
        assert not (out / "to_review.csv").exists()
        fails(capsys, "review", out, "--budget", "0", message="at least 1 image")

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

    def test_after_a_curation_into_parquet(self, root, tmp_path):
        pytest.importorskip("pyarrow")
        make_manifest(root, DECISIONS).write(tmp_path / "big", parquet=True)
        assert main(["apply", str(tmp_path / "big"), "--to", str(tmp_path / "to")]) == 0
        assert (tmp_path / "to/keep/left/0.png").read_bytes() == (root / "left/0.png").read_bytes()

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


def test_of_many_changes_the_screen_shows_the_first_and_a_table_all(out, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_MOST_CHANGES", 1)
    changed = {**DECISIONS, "left/0.png": "reject", "left/1.png": "reject"}
    make_manifest(root, changed).write(tmp_path / "later")
    assert main(["diff", str(out), str(tmp_path / "later"), "--out", str(tmp_path / "changes.csv")]) == 1
    told = capsys.readouterr().out
    assert "left/1.png" not in told
    assert "and 1 more" in told
    assert pd.read_csv(tmp_path / "changes.csv").image_path.tolist() == ["left/0.png", "left/1.png"]


def test_names_with_brackets_are_shown_as_they_are(capsys):
    show(pd.DataFrame({"image_path": ["[bold]a[/].png", "[/x]"], "score": [1.0, 2.345]}), ["image_path", "score"])
    told = capsys.readouterr().out
    assert "[bold]a[/].png" in told
    assert "2.35" in told or "2.34" in told


def test_report(out, root, capsys):
    fails(capsys, "report", out, message="There is no ")
    make_manifest(root, DECISIONS).write(out, {"evidence.npz": make_evidence().save})
    for manifest in (out, out / "manifest.csv"):
        assert main(["report", str(manifest)]) == 0
        assert "2 of 6 images" in (out / "report.html").read_text()
        (out / "report.html").unlink()
    assert str(out / "report.html") in capsys.readouterr().out


def test_what_is_not_there_is_told_before_heavy_imports(tmp_path):
    code = "import sys; from anomalib_metarefine.cli import main; codes = [main([*c.split(), *sys.argv[1:]]) for c in ["
    code += (
        "'curate', 'apply', 'review', 'report', 'diff x']]; print(codes, 'torch' in sys.modules, 'cv2' in sys.modules)"
    )
    arguments = [str(tmp_path / "no")]
    code = code.replace("'curate'", "'curate --out out'").replace("'apply'", "'apply --to to'")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2, 2, 2, 2] False False\n"
    assert done.stderr.count("metarefine: There is no ") == 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("meta_algorithm=reptile", "'reptile'"),
        ("meta_backend=jax", "'jax'"),
        ("meta_steps=many", "a whole number of at least 0"),
        ("steps=3", "found 'steps=3'"),
        ("shrinkage=5", "shrinkage must be a number in [0, 1], found 5"),
        ("rule=nonsense", "found 'rule=nonsense'"),
    ],
)
def test_settings_that_cannot_be_are_named_before_images_are_read(tmp_path, capsys, setting, message):
    nowhere = str(tmp_path / "nowhere")  # reading it would fail in another way
    assert main(["meta-train", "--data", nowhere, "--out", str(tmp_path / "x.ckpt"), "--settings", setting]) == 2
    assert message in capsys.readouterr().err
