import subprocess
import sys
from email.message import Message
from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from anomalib_metarefine.cli import doctor, main
from anomalib_metarefine.features import offline


def states(findings):
    return [found.state for found in findings]


def test_a_missing_package_is_named_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy>=1", "no-such-package>=2", "torch>=999"])
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "no-such-package is missing; torch " in told
    assert "-> " in told.split("FAIL", 1)[1].splitlines()[1]
    assert "numpy 1" not in told.split("FAIL", 1)[1].splitlines()[0]


def test_an_extra_that_is_not_installed_is_no_fault(monkeypatch):
    package = Message()
    package["Provides-Extra"] = "parquet"
    package["Provides-Extra"] = "dev"
    monkeypatch.setattr(metadata, "metadata", lambda _: package)
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy>=1", 'no-such-package; extra == "parquet"'])
    [found] = doctor._extras()
    assert found.state == "note"
    assert "[parquet]'" in found.todo
    assert states(doctor._versions()) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("text", "unmet"), [("numpy>=1", ""), ("numpy<1", " is not <1"), ("no-such-package", "is missing")]
)
def test_requirements(text, unmet):
    found = doctor._unmet(Requirement(text))
    assert found.endswith(unmet)
    assert bool(found) == bool(unmet)


class TestPlugin:
    @pytest.fixture(autouse=True)
    def hooked(self, monkeypatch):
        import anomalib_metarefine._startup  # noqa: F401  (a test run without the hook lacks it)

        monkeypatch.delenv("ANOMALIB_PLUGINS", raising=False)

    def points(self, monkeypatch, *pairs):
        known = [SimpleNamespace(name=name, module=module) for name, module in pairs]
        monkeypatch.setattr(metadata, "entry_points", lambda group: known if group == "anomalib.models" else [])

    def test_registered(self, monkeypatch):
        self.points(monkeypatch, ("MetaRefine", "anomalib_metarefine.model.lightning_model"))
        assert states(doctor._plugin()) == ["ok"]

    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv("ANOMALIB_PLUGINS", "off")
        assert states(doctor._plugin())[0] == "FAIL"

    def test_hook_or_entry_point_gone(self, monkeypatch):
        self.points(monkeypatch)
        assert states(doctor._plugin()) == ["FAIL"]
        self.points(monkeypatch, ("MetaRefine", "anomalib_metarefine.model.lightning_model"))
        monkeypatch.setattr(sys, "meta_path", [])
        assert states(doctor._plugin())[0] == "FAIL"

    def test_a_plugin_whose_module_is_gone(self, monkeypatch):
        self.points(
            monkeypatch, ("MetaRefine", "anomalib_metarefine.model.lightning_model"), ("Old", "anomalib_metarefine.no")
        )
        assert states(doctor._plugin()) == ["ok", "note"]


def test_no_offline_weights(monkeypatch):
    monkeypatch.setattr(offline, "is_installed", lambda _: False)
    assert states(doctor._backbones())[0] == "FAIL"


def test_cached_backbones_are_listed(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (tmp_path / "models--somebody--else" / "snapshots" / "0").mkdir(parents=True)
    import huggingface_hub

    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    assert doctor._cached_backbones() == ["resnet18.a1_in1k"]


def test_little_room_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert states(doctor._disk()) == ["note", "note"]


def test_does_without_anomalib():
    code = "import sys; from anomalib_metarefine.cli import main; main(['doctor']); print('anomalib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert done.stderr == ""
