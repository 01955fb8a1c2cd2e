"""The loss before and after meta-training, from images to figures."""

import json
import subprocess
import sys

import numpy as np
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.refinement.engine import FitSettings
from studies.landscape import Around, Landscape, loss_landscape

FILES = ["landscape.json", "landscape.png", "landscape.svg"]
SMALL = ["--image-size", "96", "96", "--points", "5", "--directions", "3", "--patches", "256"]
SETTINGS = [
    "--settings",
    "dimensions=16",
    "blocks=2",
    "hidden=8",
    "meta_steps=3",
    "meta_algorithm=fomaml",
    "inner_lr=0.05",
]


def run(parts, out, *more):
    assert main(["landscape", str(parts / "train/good"), "--out", str(out), *SMALL, *SETTINGS, *more]) == 0
    return json.loads((out / "landscape.json").read_text(encoding="utf-8"))


def test_command_writes_everything_and_the_same_again(parts, tmp_path, capsys):
    (parts / "train/good/broken.png").write_text("no image")
    found = run(parts, tmp_path / "one", "--radius", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("At a distance of 2, the loss ")
    assert lines[-2].startswith("The largest eigenvalue of the Hessian is ")
    assert lines[-1].endswith("one: landscape.json, landscape.png, landscape.svg")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == FILES
    assert (found["images"], found["steps"]) == (24, [-2, -1, 0, 1, 2])
    assert found["settings"]["meta_steps"] == 3
    assert found["settings"]["meta_algorithm"] == "fomaml"
    assert found["versions"]["torch"]
    for side in ("before", "after"):
        assert np.shape(found[side]["surface"]) == (5, 5)
        assert found[side]["surface"][2][2] == 0
        assert found[side]["rise_sd"] > 0
        assert found[side]["largest_eigenvalue"] > 0
    assert found["after"]["loss"] != found["before"]["loss"]
    assert found["after"]["surface"] != found["before"]["surface"]
    again = run(parts, tmp_path / "two", "--radius", "2")
    assert again == found
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in FILES)
    assert run(parts, tmp_path / "three", "--radius", "2", "--seed", "1") != found


def test_without_meta_training_both_are_the_same(parts):
    """The same patches and the same directions, then; the size comes from the images."""
    settings = FitSettings(dimensions=16, blocks=2, hidden=8, meta_steps=0)
    data = str(parts / "train/good")
    found = loss_landscape(data, points=3, directions=2, patches=64, settings=settings, progress=False)
    np.testing.assert_array_equal(found.before.surface, found.after.surface)
    np.testing.assert_array_equal(found.before.rises, found.after.rises)
    assert found.before.eigenvalue == found.after.eigenvalue
    assert found.run["settings"]["image_size"] == [256, 256]


@pytest.mark.parametrize(
    ("rise", "eigenvalue", "sphere", "curvature"),
    [
        (0.1, 1.0, "rises by 0.1 ± 0.01 after: 2.0 times flatter.", "2 before and 1 after: 2.0 times flatter."),
        (0.8, 2.01, "rises by 0.8 ± 0.01 after: 4.0 times sharper.", "2 before and 2.01 after: about as sharp."),
        (
            -0.1,
            -1.0,
            "falls by 0.1 ± 0.01 after: where the loss falls there is no minimum",
            "2 before and -1 after: wh",
        ),
    ],
)
def test_verdict_in_words(rise, eigenvalue, sphere, curvature):
    def around(rise, eigenvalue):
        return Around(2.0, rise + np.array([-0.01, 0, 0.01]), eigenvalue, np.zeros((3, 3)))

    lines = Landscape(around(0.2, 2.0), around(rise, eigenvalue), np.array([-1.0, 0, 1]), {}).verdict.splitlines()
    assert lines[0].startswith("At a distance of 1, the loss rises by 0.2 ± 0.01 bits per dimension before")
    assert sphere in lines[0]
    assert curvature in lines[1]
    assert len(lines) == 2


def test_first_direction_is_drawn_from_left_to_right():
    steps = np.linspace(-1, 1, 5)
    slope = np.repeat(steps[:, None], 5, axis=1)
    side = Around(0.0, np.ones(2), 1.0, slope)
    figure = Landscape(side, side, steps, {})._figure()
    zero = next(
        path
        for level, path in zip(
            figure.axes[0].collections[1].levels, figure.axes[0].collections[1].get_paths(), strict=True
        )
        if level == 0
    )
    np.testing.assert_allclose(zero.vertices[:, 0], 0, atol=1e-9)
    assert np.ptp(zero.vertices[:, 1]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "20"], "points must be odd and at least 3"),
        (["--radius", "0"], "radius must be a positive number"),
        (["--directions", "1"], "directions must be at least 2"),
        (["--patches", "0"], "patches must be at least 1"),
        (["--settings", "steps=3"], "with a name of "),
        (["--settings", "meta_steps=many"], "meta_steps is of type int (default 10), found 'many'"),
        (["--settings", "inner_lr"], "inner_lr is of type float (default 0.1), found ''"),
    ],
)
def test_bad_input(parts, tmp_path, capsys, arguments, message):
    assert main(["landscape", str(parts), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_readable(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no image")
    assert main(["landscape", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "None of the 1 images can be read. The first is" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys; from anomalib_metarefine.cli import main\ntry: main(['landscape', '--help'])\n"
    code += "except SystemExit: pass\nprint([m for m in ('torch', 'anomalib', 'numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "--settings NAME=VALUE" in done.stdout
