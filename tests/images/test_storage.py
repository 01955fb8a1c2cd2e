"""Images and runs that do not lie on this machine."""

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anomalib_metarefine.curation.apply import apply
from anomalib_metarefine.curation.curate import curate
from anomalib_metarefine.curation.diff import diff
from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.images.hashes import file_sha256
from anomalib_metarefine.images.reading import UnreadableImageError, header_size, read_image
from anomalib_metarefine.images.sources import read_source
from anomalib_metarefine.images.storage import is_inside, located


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed (extra `remote`)")


def memory(folder):
    there = located(f"memory://{uuid.uuid4().hex}/parts")
    put(folder, there)
    return there


def zipped(folder):
    with zipfile.ZipFile(folder.parent / "all.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return folder.parent / "all.zip"


def zipped_elsewhere(folder):
    there = located(f"memory://{uuid.uuid4().hex}/all.zip")
    there.parent.mkdir(parents=True)
    there.write_bytes(zipped(folder).read_bytes())
    return f"zip://::{there}"


def put(folder, there):
    for file in folder.rglob("*.*"):
        target = there / file.relative_to(folder).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


@pytest.fixture
def images(parts):
    """Good and defective images, a hidden one and a text."""
    folder = parts / "all"
    shutil.copytree(parts / "train/good", folder / "good")
    shutil.copytree(parts / "test/blob", folder / "more/blob")
    shutil.copy(folder / "good/000.png", folder / "good/.hidden.png")
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on this machine, and a bucket of it."""
    if any(importlib.util.find_spec(name) is None for name in ("moto", "s3fs", "upath")):
        pytest.skip("moto, s3fs or universal_pathlib is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("parts")
        yield "s3://parts"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@needs("upath")
@pytest.mark.parametrize("put_there", [memory, zipped, zipped_elsewhere, lambda folder: f"file://{folder}"])
def test_the_images_of_a_storage_are_those_of_the_folder(images, put_there):
    here, there = read_source(images), read_source(put_there(images))
    assert there.names == here.names
    assert len(there.names) == 32
    assert [file_sha256(path) for path in there.paths[:3]] == [file_sha256(path) for path in here.paths[:3]]
    assert (read_image(there.paths[0]).levels == read_image(here.paths[0]).levels).all()
    assert header_size(there.paths[0]) == header_size(here.paths[0]) is not None


@needs("upath")
def test_an_archive_is_looked_into_once(images, monkeypatch):
    from fsspec.implementations.zip import ZipFileSystem

    made, init = [], ZipFileSystem.__init__

    def counted(self, *arguments, **settings):
        made.append(self)
        init(self, *arguments, **settings)

    monkeypatch.setattr(ZipFileSystem, "__init__", counted)
    paths = read_source(zipped(images)).paths
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_image, [*paths, *map(str, paths)]))) == 64
    assert [file_sha256(path) for path in paths[:2]]
    assert len(made) < 8
    with zipfile.ZipFile(images.parent / "all.zip", "w") as archive:
        archive.write(images / "good/001.png", "other.png")
    assert read_source(images.parent / "all.zip").names == ["other.png"]


@needs("upath")
def test_a_table_may_name_images_at_addresses(images, tmp_path):
    root = memory(images)
    table = tmp_path / "table.csv"
    table.write_text(f"image_path\n{root}/good/001.png\n{root}/more/blob/002.png\n{root}/gone.png\n")
    source = read_source(table)
    assert str(source.root) == str(root)
    assert source.names == ["gone.png", "good/001.png", "more/blob/002.png"]
    with pytest.raises(FileNotFoundError):
        read_image(source.paths[0])
    (root / "lists").mkdir()
    (root / "lists/some.csv").write_text(f"image_path\n{root}/good/001.png\n")
    assert read_source(str(root / "lists/some.csv")).names == ["001.png"]
    assert read_source([images / "good/001.png"]).names == ["001.png"]
    table.write_text(f"image_path\n{root}/good/001.png\n{images}/good/001.png\n")
    with pytest.raises(ValueError, match="lie outside the root"):
        read_source(table)


@needs("upath")
def test_what_is_said_where_there_is_nothing(images):
    root = memory(images)
    with pytest.raises(FileNotFoundError, match="There is no memory://"):
        read_source(f"{root}/none")
    with pytest.raises(FileNotFoundError, match="No images under memory://"):
        read_source(root, extensions=["jp2"])
    with pytest.raises(ValueError, match="no address that can be opened"):
        read_source("nowhere://bucket/a")
    (root / "empty.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"memory://.*the file is empty"):
        read_image(root / "empty.png")


def test_local_paths_need_no_package(images):
    code = (
        "import sys; sys.modules |= dict.fromkeys(['upath', 'fsspec'])\n"
        "from anomalib_metarefine.images.sources import read_source\n"
        f"assert len(read_source({str(images)!r}).paths) == 32\n"
        "try: read_source('s3://bucket/parts')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'anomalib-metarefine[remote]'" in said.stdout


def test_inside():
    assert is_inside(Path("/a/b"), Path("/a"))
    assert not is_inside(Path("/ab"), Path("/a"))


@needs("upath")
def test_inside_of_an_address():
    assert is_inside(located("memory://a/b/c"), located("memory://a/b"))
    assert not is_inside(located("memory://a/bc"), located("memory://a/b"))
    assert not is_inside(Path("/a/b"), located("memory://a/b"))


def curated_like_the_folder(images, there, out, tmp_path):
    settings = {"image_size": (64, 64), "progress": False, "rounds": 2}
    here = curate(images, **settings).manifest
    curation = curate(str(there), **settings)
    report = curation.write(out)
    manifest = Manifest.read(out)
    assert str(manifest.root) == str(read_source(str(there)).root)
    assert diff(here, manifest).empty
    assert (manifest.table.score == here.table.score).all()
    assert manifest.verify() == ([], [])
    assert Evidence.load(located(out) / "evidence.npz").paths == curation.evidence.paths
    assert b"data:image/jpeg" in report.read_bytes()
    assert sorted(file.name for file in located(out).iterdir()) == [
        "evidence.npz", "manifest.csv", "report.html", "run.json"
    ]  # fmt: skip
    applied = apply(manifest, tmp_path / "sorted", "copy", review="keep")
    assert applied.counts["keep"] + applied.counts["reject"] == 32
    name = manifest.table.image_path[manifest.table.decision == "keep"].iloc[0]
    assert (tmp_path / "sorted/keep" / name).read_bytes() == (images / name).read_bytes()
    with pytest.raises(ValueError, match="Use mode 'copy' or 'list'"):
        apply(manifest, tmp_path / "links")
    with pytest.raises(ValueError, match="anomalib reads images of this machine only"):
        manifest.datamodule()
    return manifest


@needs("upath")
def test_curated_in_memory(images, tmp_path):
    out = f"memory://{uuid.uuid4().hex}/run"
    manifest = curated_like_the_folder(images, memory(images), out, tmp_path)
    (manifest.root / "good/001.png").write_bytes(b"other")
    assert manifest.verify().changed == ["good/001.png"]


def test_curated_on_s3(images, tmp_path, bucket):
    there = located(f"{bucket}/line 7")
    put(images, there)
    curated_like_the_folder(images, there, f"{bucket}/runs/1", tmp_path)


@needs("upath")
def test_an_upload_that_breaks_off_leaves_the_run_before(images, monkeypatch):
    out = located(f"memory://{uuid.uuid4().hex}/run")
    first = curate(memory(images), image_size=(64, 64), progress=False, rounds=0)
    first.write(out)
    before = (out / "run.json").read_bytes()
    first.manifest.run["seed"] = 7
    put_file = out.fs.put_file

    def cut(source, target):
        if target.endswith("run.json"):
            raise OSError("the network is down")
        put_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(out.fs), "put_file", staticmethod(cut))
        with pytest.raises(OSError, match="network is down"):
            first.write(out)
    assert (out / "run.json").read_bytes() == before
    assert Manifest.read(out).run["seed"] == 0

    # All is there, but a part has not been copied to its place: whoever reads it next does that.
    with monkeypatch.context() as patch:
        patch.setattr(type(out.fs), "copy", staticmethod(lambda *_: os.kill))
        patch.setattr("anomalib_metarefine.curation.run_folder._finish_upload", lambda _: None)
        first.write(out)
    assert Manifest.read(out).run["seed"] == 7
    assert not [file for file in out.iterdir() if file.name.startswith(".complete")]
