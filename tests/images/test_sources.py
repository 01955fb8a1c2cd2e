import os

import pandas as pd
import pytest
import yaml

from anomalib_metarefine.images.datamodules import load_datamodule, set_up_without_validation
from anomalib_metarefine.images.sources import read_source, read_table
from tests.conftest import folder
from tests.curation.test_manifest import make_manifest


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


class TestFolder:
    def test_is_searched_with_its_subfolders(self, tmp_path):
        touch(tmp_path, "b.png", "sub/deep/a.JPG", "sub.png", ".hidden.png", ".git/c.png", "notes.txt", "sub/x.tiff")
        source = read_source(tmp_path)
        assert source.names == ["b.png", "sub.png", "sub/deep/a.JPG", "sub/x.tiff"]
        assert source.paths == [tmp_path / name for name in source.names]
        assert (source.root, source.name, source.datamodule) == (tmp_path, tmp_path.name, None)

    def test_relative_to_the_working_directory(self, tmp_path, monkeypatch):
        touch(tmp_path, "data/a.png")
        monkeypatch.chdir(tmp_path / "data")
        assert read_source("../data").paths == [tmp_path / "data" / "a.png"]
        assert read_source(".", root="..").names == ["data/a.png"]

    def test_a_hidden_folder_can_be_asked_for(self, tmp_path):
        touch(tmp_path, ".cache/a.png")
        assert read_source(tmp_path / ".cache").names == ["a.png"]

    @pytest.mark.parametrize("extensions", [["dat"], [".DAT", "raw"]])
    def test_extensions(self, tmp_path, extensions):
        touch(tmp_path, "a.png", "b.dat", "c.xdat")
        assert read_source(tmp_path, extensions=extensions).names == ["b.dat"]

    def test_links_are_followed_once(self, tmp_path):
        touch(tmp_path, "data/real/a.png", "outside/b.png")
        (tmp_path / "data" / "a_loop").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "real" / "up").symlink_to("..")
        (tmp_path / "data" / "again").symlink_to("real")
        (tmp_path / "data" / "far").symlink_to(tmp_path / "outside")
        (tmp_path / "outside" / "back").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "link.png").symlink_to("real/a.png")
        (tmp_path / "data" / "dangling.png").symlink_to("nowhere")  # listed, so that it is reported as unreadable
        assert read_source(tmp_path / "data").names == ["dangling.png", "far/b.png", "link.png", "real/a.png"]

    def test_without_images(self, tmp_path):
        touch(tmp_path, "a.txt")
        with pytest.raises(FileNotFoundError) as error:
            read_source(tmp_path, extensions=["png", "JPG"])
        message = f"No images under {tmp_path} (looked for .png, .jpg). Pass --extensions or check the path."
        assert str(error.value) == message

    def test_names_that_are_no_text(self, tmp_path):
        os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT))
        with pytest.raises(ValueError, match=r"1 file names in .* are no line of text: .*udcff.png.*Rename"):
            read_source(tmp_path)

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
    @pytest.mark.parametrize("name", ["carriage\rreturn.png", "new\nline.png"])
    def test_names_that_break_a_table(self, tmp_path, name):
        touch(tmp_path, name, "good.png")
        with pytest.raises(ValueError, match=r"1 file names in .* are no line of text: .*\\[rn].*Rename"):
            read_source(tmp_path)

    def test_a_folder_that_can_t_be_read_is_said(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.png", "locked/b.png")
        listed = os.scandir

        def denied(path):  # for root, no folder is closed
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", denied)
        with pytest.raises(PermissionError, match=r"1 folders under .*locked \(Permission denied\)\. Make them"):
            read_source(tmp_path)


class TestTable:
    def test_relative_to_its_folder_or_the_root(self, tmp_path):
        touch(tmp_path, "data/sub/a.png", "data/NA", "lists/sub/a.png")
        csv = tmp_path / "lists" / "train.csv"
        pd.DataFrame({"label": 1, "image_path": ["sub/a.png"]}).to_csv(csv, index=False)
        assert read_source(csv).paths == [tmp_path / "lists" / "sub" / "a.png"]
        pd.DataFrame({"image_path": ["sub/a.png", "NA"]}).to_csv(csv, index=False)
        source = read_source(csv, root=tmp_path / "data")
        assert (source.names, source.name) == (["NA", "sub/a.png"], "train")

    def test_as_spreadsheets_write_it(self, tmp_path):
        touch(tmp_path, "für,1.png")
        csv = tmp_path / "list.csv"
        csv.write_bytes("\ufefflabel;image_path\r\n1;für,1.png\r\n".encode())
        assert read_source(csv).names == ["für,1.png"]

    def test_images_that_lie_elsewhere(self, tmp_path):
        touch(tmp_path, "data/x/a.png", "data/y/b.png", "lists/c.png")
        csv = tmp_path / "lists" / "train.csv"
        pd.DataFrame({"image_path": [tmp_path / "data/x/a.png", "../data/y/b.png"]}).to_csv(csv, index=False)
        assert read_source(csv).names == ["x/a.png", "y/b.png"]
        assert read_source(csv).root == tmp_path / "data"
        pd.DataFrame({"image_path": [tmp_path / "data/x/a.png", "c.png"]}).to_csv(csv, index=False)
        with pytest.raises(ValueError, match=f"1 of 2 images in .* lie outside the root {tmp_path / 'lists'}: .*a.png"):
            read_source(csv, root=tmp_path / "lists")

    def test_our_own_manifest(self, tmp_path):
        touch(tmp_path, "data/a.png", "data/b.png")
        manifest = make_manifest(tmp_path / "data", {"a.png": "keep", "b.png": "reject"})
        csv = manifest.write(tmp_path / "out")
        source = read_source(csv)
        assert (source.root, source.names) == (tmp_path / "data", ["a.png", "b.png"])
        (tmp_path / "out" / "run.json").write_text("[]")
        with pytest.raises(ValueError, match="names no root. Pass --root"):
            read_source(csv)

    def test_repeated_rows_are_taken_once(self, tmp_path, caplog):
        touch(tmp_path, "a.png", "b.png")
        pd.DataFrame({"image_path": ["b.png", "a.png", "./a.png"]}).to_csv(tmp_path / "l.csv", index=False)
        assert read_source(tmp_path / "l.csv").names == ["a.png", "b.png"]
        assert "1 images are named more than once" in caplog.text

    def test_says_what_is_wrong(self, tmp_path):
        csv = tmp_path / "list.csv"
        csv.write_text("path,label\na.png,1\n")
        with pytest.raises(ValueError, match=r"list.csv has no column image_path; found path, label\. Rename"):
            read_source(csv)
        touch(tmp_path, "here.png")
        pd.DataFrame({"image_path": ["here.png", *(f"{i}.png" for i in range(9))]}).to_csv(csv, index=False)
        with pytest.raises(FileNotFoundError) as error:
            read_source(csv)
        assert str(error.value).startswith(f"9 of 10 images in {csv} do not exist: {tmp_path / '0.png'}, ")
        assert str(error.value).endswith(
            f"and 4 more. Relative paths are relative to {tmp_path}; pass --root if they are not."
        )
        csv.write_text("image_path,label\na.png,1\n,2\n")
        with pytest.raises(ValueError, match=r"no image_path in row 2 \(of 2\)"):
            read_source(csv)
        csv.write_text("image_path\n")
        with pytest.raises(FileNotFoundError, match="No images in .*list.csv"):
            read_source(csv)
        csv.write_bytes(b"image_path\n\xff\n")
        with pytest.raises(ValueError, match="can't be read as a table .*Expected UTF-8"):
            read_source(csv)
        csv.write_bytes(b"")
        with pytest.raises(ValueError, match="can't be read as a table"):
            read_source(csv)

    def test_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        touch(tmp_path, "a.png")
        pd.DataFrame({"image_path": ["a.png"]}).to_parquet(tmp_path / "list.parquet")
        assert read_source(tmp_path / "list.parquet").names == ["a.png"]
        (tmp_path / "list.parquet").write_bytes(b"PAR1 but no more")
        with pytest.raises(ValueError, match="can't be read as a table"):
            read_source(tmp_path / "list.parquet")

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        def fail(path):
            raise ImportError("Unable to find a usable engine")

        (tmp_path / "list.parquet").touch()
        monkeypatch.setattr(pd, "read_parquet", fail)
        with pytest.raises(ModuleNotFoundError, match="list.parquet needs pyarrow. Run `pip install pyarrow`"):
            read_table(tmp_path / "list.parquet")


class TestDatamodule:
    def test_gives_its_whole_training_set(self, parts):
        theirs = folder(parts, val_split_mode="from_train")
        source = read_source(theirs)
        assert (len(source.paths), source.root) == (24, parts / "train" / "good")
        assert (source.names[0], source.name) == ("000.png", "parts")
        assert type(source.datamodule) is type(theirs)
        assert not hasattr(theirs, "train_data")
        assert read_source(theirs, root=parts).names[0] == "train/good/000.png"

    @pytest.mark.parametrize("class_path", ["Folder", "anomalib.data.Folder"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_from_its_config(self, parts, class_path, nested):
        settings = {"name": "parts", "root": str(parts), "normal_dir": "train/good", "abnormal_dir": ["test/blob"]}
        config = {"class_path": class_path, "init_args": settings}
        (parts / "data.yaml").write_text(yaml.safe_dump({"data": config} if nested else config))
        source = read_source(parts / "data.yaml")
        assert len(source.paths) > 0
        assert {path.parent for path in source.paths} == {parts / "train" / "good"}
        assert source.datamodule.abnormal_dir == ["test/blob"]

    def test_after_a_training(self, parts):
        """The Engine has taken a validation set out of it, and marked it as set up."""
        from lightning.pytorch.trainer.states import TrainerFn

        theirs = folder(parts, val_split_mode="from_train", val_split_ratio=0.5)
        theirs.setup(TrainerFn.FITTING)
        assert len(theirs.train_data) == 12
        assert len(set_up_without_validation(theirs).train_data) == 24
        assert len(theirs.train_data) == 12

    def test_a_datamodule_in_a_datamodule_as_anomalib_train_reads_it(self, tmp_path):
        inner = {"class_path": "anomalib_metarefine.ELPV", "init_args": {"train_images": 20}}
        config = {
            "class_path": "anomalib_metarefine.Contaminated",
            "init_args": {"datamodule": inner, "contamination": 0.2, "protocol": "add"},
        }
        (tmp_path / "dirty.yaml").write_text(yaml.safe_dump(config))
        found = load_datamodule(tmp_path / "dirty.yaml")
        assert type(found).__name__ == "Contaminated"
        assert (found.contamination, found.protocol) == (0.2, "add")
        source = read_source(tmp_path / "dirty.yaml")
        assert len(source.paths) == 25  # 20 good ones, and a fifth of the whole
        assert all(path.is_file() for path in source.paths)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[1, 2]", "describes no datamodule. Expected `class_path`"),
            ("a: {", "describes no datamodule"),
            ("data: Folder", "describes no datamodule"),
            ("class_path: Nonsense", "anomalib knows no datamodule Nonsense"),
            ("class_path: 3", "describes no datamodule"),
            ("class_path: Folder", "(?s)Folder can't be made with these settings .*is required"),
        ],
    )
    def test_says_what_is_wrong_with_a_config(self, tmp_path, text, message):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_datamodule(tmp_path / "data.yaml")

    def test_says_that_it_can_t_be_set_up(self, tmp_path):
        config = {"class_path": "Folder", "init_args": {"name": "x", "root": str(tmp_path), "normal_dir": "none"}}
        (tmp_path / "data.yml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match="The datamodule x can't be set up"):
            read_source(tmp_path / "data.yml")


class TestPaths:
    def test_have_their_common_folder_as_root(self, tmp_path):
        touch(tmp_path, "x/y/b.png", "x/a.png")
        source = read_source([tmp_path / "x/y/b.png", str(tmp_path / "x/a.png")])
        assert (source.root, source.names) == (tmp_path / "x", ["a.png", "y/b.png"])
        assert read_source(pd.Series([str(tmp_path / "x/a.png")])).names == ["a.png"]

    def test_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No images in the list of paths"):
            read_source([])
        with pytest.raises(FileNotFoundError, match="1 of 1 images in the list of paths do not exist"):
            read_source([tmp_path / "no.png"])
        with pytest.raises(FileNotFoundError, match=r"There is no .*no\. Expected a folder of images, a .csv"):
            read_source(tmp_path / "no")
        touch(tmp_path, "a.png")
        with pytest.raises(ValueError, match=r"Can't take images from .*a.png\. Expected a folder"):
            read_source(tmp_path / "a.png")
        with pytest.raises(ValueError, match="Can't take images from a int"):
            read_source(3)
