"""What `Evidence` writes is read again, and nothing else is taken for it."""

import numpy as np
import pytest

from anomalib_metarefine.curation.evidence import Evidence
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest


def make_evidence(paths=("right/3.png", "right/5.png"), groups=(0, -1), nearest="left/0.png") -> Evidence:
    maps = np.random.default_rng(0).random((len(paths), 2, 3)).astype(np.float16)
    unusual = np.ones((1, 2, 3), dtype=bool)
    features = np.arange(8, dtype=np.float16).reshape(2, 4)
    spoilt = (["left/1.png"], unusual)
    everything = (["left/0.png", "left/1.png"], features)
    return Evidence(list(paths), maps, [nearest] * len(paths), list(groups), (0.0, 1.0), *spoilt, *everything)


def write(out, evidence):
    """Evidence as part of a run."""
    root = make_files(out.parent / "data")
    make_manifest(root, DECISIONS).write(out, {"evidence.npz": evidence.save})
    return out / "evidence.npz"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_comes_back_as_it_was(out):
    evidence = make_evidence()
    again = Evidence.load(write(out, evidence))
    assert (again.paths, again.nearest, again.groups) == (evidence.paths, evidence.nearest, evidence.groups)
    assert (again.limits, again.unusual_in) == (evidence.limits, evidence.unusual_in)
    np.testing.assert_array_equal(again.maps, evidence.maps)
    np.testing.assert_array_equal(again.unusual, evidence.unusual)
    assert again.images == evidence.images
    np.testing.assert_array_equal(again.features, evidence.features)


def test_is_of_the_run_that_lies_beside(out):
    file = write(out, make_evidence())
    content = file.read_bytes()
    for damaged in (b"", content[:-20]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="evidence.npz is not the file that run.json was written with"):
            Evidence.load(file)
    write(out, make_evidence(groups=(1, 1)))
    file.write_bytes(content)
    with pytest.raises(ValueError, match="or of another run"):
        Evidence.load(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="There is no .*evidence.npz"):
        Evidence.load(file)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "./a.png"])
@pytest.mark.parametrize("where", ["paths", "nearest", "unusual_in", "images"])
def test_names_lead_nowhere_else(out, name, where):
    evidence = make_evidence()
    getattr(evidence, where)[0] = name
    with pytest.raises(ValueError, match=f"must be relative to the root, inside of it and .*; found {name}"):
        Evidence.load(write(out, evidence))


def test_says_that_an_archive_is_none_of_ours(out):
    class Other:
        def __init__(self, write):
            self.save = write

    def keyless(path):
        with path.open("wb") as file:
            np.savez(file, paths=np.array(["a.png"]))

    for save in (keyless, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no archive")):
        with pytest.raises(ValueError, match="evidence.npz is damaged"):
            Evidence.load(write(out, Other(save)))
    for change in ({"groups": [0]}, {"maps": np.zeros((1, 2, 3))}, {"unusual_in": []}, {"maps": np.zeros(2)}):
        evidence = make_evidence()
        for name, value in change.items():
            setattr(evidence, name, value)
        with pytest.raises(ValueError, match="not of the same number of images"):
            Evidence.load(write(out, evidence))
