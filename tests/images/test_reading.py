import hashlib

from PIL import Image

from anomalib_metarefine.images.reading import check_images


def test_tells_the_readable_from_the_broken(tmp_path):
    good, truncated, empty = (tmp_path / name for name in ("good.png", "truncated.png", "empty.png"))
    Image.new("RGB", (40, 30), "red").save(good)
    truncated.write_bytes(good.read_bytes()[:60])
    empty.touch()
    missing = tmp_path / "missing.png"
    checked = check_images([good, truncated, empty, missing])
    assert checked.hashes == {str(good): hashlib.sha256(good.read_bytes()).hexdigest()}
    assert list(checked.unreadable) == [str(path) for path in (truncated, empty, missing)]
    assert checked.unreadable[str(empty)] == "the file is empty"
    assert "missing.png" in checked.unreadable[str(missing)]
