"""Checkpoints are read without running what is in them, and written whole or not at all."""

import os
import pickle
import signal
import subprocess
import sys

import pytest
import timm
import torch
from anomalib.models import Stfpm

from anomalib_metarefine.cli import main
from anomalib_metarefine.model.checkpoints import FORMAT, load_checkpoint, new_file, read_checkpoint


@pytest.fixture
def altered(trained, tmp_path):
    """A function that writes a copy of a real checkpoint with something changed."""

    def write(change):
        content = torch.load(trained.checkpoint, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt"

    return write


@pytest.mark.parametrize("section", ["hyper_parameters", "hparams", "module_arguments"])
@pytest.mark.parametrize(
    "named", [{"_instantiator": "os.system"}, {"a": [{"_class_path": "x.Y"}]}, {"b": {"class_path": "torch.nn.Linear"}}]
)
def test_what_imports_is_refused_before_lightning_sees_it(altered, section, named, monkeypatch, capsys, tmp_path):
    path = altered(lambda content: content.setdefault(section, {}).update(named))
    monkeypatch.setattr(
        "anomalib.models.AnomalibModule.load_from_checkpoint", lambda *_, **__: pytest.fail("Lightning has loaded it")
    )
    with pytest.raises(
        ValueError, match=r"other.ckpt is refused: its hyper-parameters name _?(instantiator|class_path)"
    ):
        load_checkpoint(path)
    assert main(["calibrate", str(path), "--out", str(tmp_path / "new.ckpt")]) == 2
    assert "is refused" in capsys.readouterr().err


class Harmful:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_torchs_advice_to_run_the_files_code_is_not_passed_on(altered, tmp_path):
    path = altered(lambda content: content.update(extra=Harmful(tmp_path / "harm")))
    with pytest.raises(ValueError, match="not loaded because that may run code") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps([1]), "dict"])
def test_other_files_are_told_apart(tmp_path, content):
    path = tmp_path / "file.ckpt"
    if content == "dict":
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file.ckpt is not a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_another_format_is_one_clear_error(altered):
    def old(content):
        del content["metarefine"]["format"]

    with pytest.raises(ValueError, match=f"has format 1 .*reads format {FORMAT} only. Train the model again"):
        load_checkpoint(altered(old))
    with pytest.raises(ValueError, match="has format 99"):
        load_checkpoint(altered(lambda content: content["metarefine"].update(format=99)))


def test_the_model_is_named_by_the_checkpoint_or_by_the_user(altered, trained):
    assert type(load_checkpoint(trained.checkpoint, "MetaRefine")).__name__ == "MetaRefine"
    with pytest.raises(ValueError, match="is a checkpoint of MetaRefine, not of Padim"):
        load_checkpoint(trained.checkpoint, "Padim")
    nameless = altered(lambda content: content.pop("metarefine"))
    with pytest.raises(ValueError, match="does not say which model it is of. Pass its name"):
        load_checkpoint(nameless)
    for name, told in (("Nothing", "There is no model 'Nothing'"), ("get_model", "get_model is not an anomalib model")):
        with pytest.raises(ValueError, match=told):
            load_checkpoint(nameless, name)
    with pytest.raises(ValueError, match="is not a checkpoint of Padim that this version reads"):
        load_checkpoint(nameless, "Padim")


def test_no_pretrained_weights_are_asked_for(tmp_path, monkeypatch):
    """They would be replaced at once, and a line has no hub to ask: STFPM asks whatever its settings."""
    create = timm.create_model

    def without_hub(name, pretrained=False, **settings):
        assert not pretrained or making
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", without_hub)
    making = True
    model = Stfpm(layers=["layer1"])
    making = False
    content = {"state_dict": model.state_dict(), "hyper_parameters": {"layers": ["layer1"]}}
    torch.save({**content, "pytorch-lightning_version": "2.6.0"}, tmp_path / "stfpm.ckpt")
    loaded = load_checkpoint(tmp_path / "stfpm.ckpt", "Stfpm")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, equal_nan=True)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "file"
    with new_file(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    with pytest.raises(FileExistsError, match="nothing is overwritten"), new_file(path):
        pytest.fail("it has begun")
    with pytest.raises(RuntimeError), new_file(tmp_path / "other"):
        raise RuntimeError
    with pytest.raises(FileExistsError), new_file(tmp_path / "raced"):
        (tmp_path / "raced").write_text("somebody else's")
    assert (tmp_path / "raced").read_text() == "somebody else's"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "new", "raced"]


def test_killed_while_saving_leaves_nothing_in_the_way(tmp_path):
    """It used to leave half a checkpoint, and then refuse to write over it."""
    program = f"""
import os, signal, sys
from anomalib_metarefine.model.checkpoints import new_file
with new_file({str(tmp_path / "x.ckpt")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "x.ckpt").exists()
    with new_file(tmp_path / "x.ckpt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "x.ckpt").read_text() == "whole"
