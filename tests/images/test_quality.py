import hashlib
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.measure import blur_effect as reference_blur_effect

from anomalib_metarefine.images.duplicates import first_of_near_copies, residual_energy, thumbnail
from anomalib_metarefine.images.quality import blur_effect, inspect_images
from tests.conftest import part


def shifted(grey, right, down):
    transform = np.float32([[1, 0, right], [0, 1, down]])
    return cv2.warpAffine(grey, transform, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE)


def resized_and_back(grey):
    small = cv2.resize(grey, None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)


def with_gain(grey, gain):
    return (grey * float(gain)).clip(0, 255).astype(np.uint8)


def lens_cap(grey):
    return np.random.default_rng(0).normal(4, 2, grey.shape).clip(0, 255).astype(np.uint8)


COPIES = {
    "JPEG at quality 80": (lambda grey: grey, "jpg"),
    "brightness x 1.03": (lambda grey: with_gain(grey, 1.03), "png"),
    "shifted by 1 pixel": (lambda grey: shifted(grey, 1, 0), "png"),
    "shifted by 1 pixel each way": (lambda grey: shifted(grey, 1, 1), "png"),
    "resized by 0.9 and back": (resized_and_back, "png"),
    "saved as BMP": (lambda grey: grey, "bmp"),
}
RUINED = {
    "Gaussian blur, sigma 3": (lambda grey: cv2.GaussianBlur(grey, (0, 0), 3), "blurred"),
    "Gaussian blur, sigma 4": (lambda grey: cv2.GaussianBlur(grey, (0, 0), 4), "blurred"),
    "Gaussian blur, sigma 3, then noise of 1 grey level": (
        lambda grey: (
            (cv2.GaussianBlur(grey, (0, 0), 3) + np.random.default_rng(0).normal(0, 1, grey.shape))
            .clip(0, 255)
            .astype(np.uint8)
        ),
        "blurred",
    ),
    "light x 0.15": (lambda grey: with_gain(grey, 0.15), "under-exposed"),
    "light x 3, clipped": (lambda grey: with_gain(grey, 3), "over-exposed"),
    "distance to white x 0.15": (lambda grey: 255 - with_gain(255 - grey, 0.15), "over-exposed"),
    "constant": (lambda grey: np.full_like(grey, 100), "blank"),
    "lens cap": (lens_cap, "blank"),
}


def grey_of(path):
    return np.asarray(Image.open(path).convert("L"))


def save(grey, path):
    Image.fromarray(grey).save(path, **({"quality": 80} if path.suffix == ".jpg" else {}))
    return path


def findings_of(paths):
    return {Path(fact.path).name: fact.findings for fact in inspect_images(paths, [path.name for path in paths])}


@pytest.fixture
def folder(tmp_path):
    """Parts that look alike, each with a mark of its own."""
    rng = np.random.default_rng(0)
    return [save(np.asarray(part(rng, (192, 192), defect=True)), tmp_path / f"{i:02d}.png") for i in range(52)]


def test_look_alikes_have_no_findings(folder):
    facts = inspect_images(folder)
    assert [fact.findings for fact in facts] == [()] * len(folder)
    assert facts[3].sha256 == hashlib.sha256(folder[3].read_bytes()).hexdigest()
    assert (facts[3].path, facts[3].width, facts[3].height, facts[3].unreadable) == (str(folder[3]), 192, 192, None)


def test_parts_that_differ_by_noise_alone_are_no_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    paths = [save(np.asarray(part(rng)), tmp_path / f"{i:02d}.png") for i in range(24)]
    for count in (1, 2, 3, 5, 9, 24):
        assert [fact.findings for fact in inspect_images(paths[:count])] == [()] * count


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("count", [4, 52])
def test_near_duplicate(folder, kind, count):
    change, extension = COPIES[kind]
    copy = save(change(grey_of(folder[1])), folder[0].with_name(f"copy.{extension}"))
    expected = {path.name: () for path in folder[:count]} | {copy.name: ("near duplicate of 01.png",)}
    assert findings_of([copy, *folder[:count]]) == expected


@pytest.mark.parametrize("kind", RUINED)
def test_ruined(folder, kind):
    ruin, expected = RUINED[kind]
    ruined = save(ruin(grey_of(folder[1])), folder[0].with_name("ruined.png"))
    folder[1].unlink()
    found = findings_of([path for path in [*folder, ruined] if path.exists()])
    assert expected in found.pop("ruined.png")
    assert set(found.values()) == {()}


def test_exact_duplicates_name_the_first_by_name(folder):
    copies = [Path(shutil.copy(folder[5], folder[5].with_name(name))) for name in ("a.png", "99.png")]
    found = findings_of([*copies, *folder])
    assert found["a.png"] == found["99.png"] == ("exact duplicate of 05.png",)
    assert Counter(found.values())[()] == len(folder)


def test_near_duplicates_form_one_group_under_the_first(folder):
    grey = grey_of(folder[7])
    for i, gain in enumerate((0.98, 0.95, 1.02)):
        folder.append(save(with_gain(grey, gain), folder[0].with_name(f"z{i}.png")))
    found = findings_of(folder)
    assert {found[f"z{i}.png"] for i in range(3)} == {("near duplicate of 07.png",)}
    assert found["07.png"] == ()


def test_unreadable_files_are_told_and_stay_out_of_the_comparison(folder):
    empty, text, cut = (folder[0].with_name(name) for name in ("empty.png", "text.png", "cut.png"))
    empty.touch()
    text.write_text("no image")
    cut.write_bytes(folder[0].read_bytes()[:2000])
    paths = [empty, text, cut, folder[0].with_name("missing.png"), *folder]
    facts = inspect_images(paths)
    assert facts[0].unreadable == "the file is empty"
    assert facts[1].unreadable.startswith("UnidentifiedImageError")
    assert facts[2].unreadable.startswith("OSError")
    assert facts[3].unreadable.startswith("FileNotFoundError")
    assert [bool(fact.sha256) for fact in facts[:4]] == [True, True, True, False]
    assert {fact.findings for fact in facts} == {()}


def test_nothing_readable_and_nothing_at_all(tmp_path):
    (tmp_path / "empty.png").touch()
    assert inspect_images([]) == []
    assert inspect_images([tmp_path / "empty.png"])[0].findings == ()


def test_black_white_and_flat_are_told_without_any_others(tmp_path):
    for level, expected in [(0, {"blank", "under-exposed"}), (255, {"blank", "over-exposed"}), (90, {"blank"})]:
        path = save(np.full((40, 60), level, np.uint8), tmp_path / f"{level}.png")
        assert set(inspect_images([path])[0].findings) == expected


def test_a_flat_product_is_not_blank(tmp_path):
    rng = np.random.default_rng(0)
    sheets = (rng.normal(128, 2, (96, 96)).astype(np.uint8) for _ in range(12))
    paths = [save(sheet, tmp_path / f"{i:02d}.png") for i, sheet in enumerate(sheets)]
    assert {fact.findings for fact in inspect_images(paths)} == {()}


def test_twelve_bits_in_sixteen_are_not_dark(folder):
    paths = []
    for path in folder:
        paths.append(path.with_suffix(".tif"))
        Image.fromarray(grey_of(path).astype(np.uint16) * 16).save(paths[-1])
    dark = save(grey_of(folder[0]).astype(np.uint16) * 2, folder[0].with_name("dark.tif"))
    found = findings_of([*paths[1:], dark])
    assert found.pop("dark.tif") == ("under-exposed", "uses 12 of 16 bits")
    assert set(found.values()) == {("uses 12 of 16 bits",)}
    facts = inspect_images([*paths[1:], dark], bit_depth=12)
    assert facts[-1].findings == ("under-exposed",)
    assert {fact.findings for fact in facts[:-1]} == {()}


def turn(path):
    """The same picture in a file that lies on its side."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(grey_of(path))).save(path, exif=exif)


def test_some_files_turned_by_exif_are_told_and_all_are_not(folder):
    for path in folder[:2]:
        turn(path)
    found = findings_of(folder)
    assert found["00.png"] == found["01.png"] == ("turned by its EXIF tag",)
    assert Counter(found.values())[()] == len(folder) - 2
    assert set(findings_of(folder[:2]).values()) == {()}


def test_several_pages_are_told(folder):
    pages = [Image.fromarray(grey_of(path)) for path in folder[:3]]
    pages[0].save(folder[0].with_suffix(".tif"), save_all=True, append_images=pages[1:])
    assert findings_of([*folder[1:], folder[0].with_suffix(".tif")])["00.tif"] == ("the first of 3 pages",)


def test_one_call_per_image_also_for_unreadable_ones(folder):
    folder[2].write_bytes(b"")
    calls = []
    inspect_images(folder, on_image=lambda: calls.append(1))
    assert len(calls) == len(folder)


def test_names_must_match_paths(folder):
    with pytest.raises(ValueError, match="Found 1 names for 52 paths"):
        inspect_images(folder, ["only one"])


def test_blur_effect_agrees_with_scikit_image():
    grey = np.asarray(part(np.random.default_rng(0), (300, 500), defect=True))
    for sigma in (0, 2, 4):
        image = cv2.GaussianBlur(grey, (0, 0), sigma) if sigma else grey
        assert blur_effect(image) == pytest.approx(reference_blur_effect(image / 255.0), abs=0.02)
    assert blur_effect(np.full((50, 50), 7, np.uint8)) == 0


def test_residual_energy_fits_gain_offset_and_shift():
    grey = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (256, 256)).astype(np.float32), (0, 0), 8)
    source = thumbnail(grey)
    target = 0.8 * thumbnail(shifted(grey, 1, 1)) + 20
    assert residual_energy(source, target) < 0.005 * target.var()
    assert residual_energy(source, source[::-1]) > 0.5 * source.var()


def test_thousands_of_look_alikes_in_blocks():
    rng = np.random.default_rng(0)
    alike = rng.normal(0, 10, (1500, 64, 64)).astype(np.float32)
    alike = 100 + np.stack([cv2.GaussianBlur(image, (0, 0), 2) for image in alike])
    alike[1400] = 1.03 * alike[20] + rng.normal(0, 0.05, (64, 64))
    first = first_of_near_copies(alike)
    assert first[1400] == 20
    assert np.flatnonzero(first != np.arange(1500)).tolist() == [1400]


@pytest.fixture(scope="module")
def cells():
    """300 good and, apart from them, 100 defective monocrystalline solar cells."""
    from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root

    table = make_elpv_samples(packaged_root(), "mono")
    rng = np.random.default_rng(0)
    good, defective = (rng.permutation(table.image_path[table.label_index == label]) for label in (0, 1))
    return {"good": [Path(path) for path in good[:300]], "defective": [Path(path) for path in defective[:100]]}


@pytest.mark.slow
def test_false_alarms_on_solar_cells(cells):
    good = findings_of(cells["good"])
    dirty = findings_of([*cells["good"][:200], *cells["defective"]])
    for found in (good, dirty):
        print({name: findings for name, findings in found.items() if findings})
    assert sum(bool(findings) for findings in good.values()) == 0
    assert sum(bool(findings) for findings in dirty.values()) <= 7


@pytest.mark.slow
def test_recall_on_solar_cells(cells, tmp_path):
    """Twice 15 images of the 300 are copied or ruined, per kind."""
    least = {"Gaussian blur, sigma 3, then noise of 1 grey level": 0.1, "shifted by 1 pixel each way": 0.9}
    good = cells["good"]
    for kind, (change, expected) in (COPIES | RUINED).items():
        copies = kind in COPIES
        extension = expected if copies else "png"
        found = 0
        for begin in (0, 15):
            chosen = good[begin : begin + 15]
            made = [save(change(grey_of(path)), tmp_path / f"made_{path.stem}.{extension}") for path in chosen]
            others = good if copies else [path for path in good if path not in chosen]
            findings = findings_of([*others, *made])
            for path, copy in zip(chosen, made, strict=True):
                # A copy saved as BMP of a PNG is another file with the same pixels.
                wanted = f"near duplicate of {path.name}" if copies else expected
                found += wanted in findings[copy.name]
        print(f"{kind}: {found} of 30")
        assert found >= 30 * least.get(kind, 0.95)
