"""What a plain `pip install` promises; every check runs in a Python of its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import sys; assert 'anomalib_metarefine._startup' in sys.modules"],
        capture_output=True,
        check=False,
    ).returncode
    != 0,
    reason="the package is on the path but not installed: run `make install` (or `pip install -e .`) first",
)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_anomalib_knows_the_model_and_the_data():
    out = python(
        "from anomalib.models import get_model, list_models\n"
        "from anomalib.data import get_datamodule\n"
        "assert 'meta_refine' in list_models()\n"
        "for spec in ('meta_refine', {'class_path': 'MetaRefine'}, {'class_path': 'anomalib.models.MetaRefine'},\n"
        "             {'class_path': 'anomalib_metarefine.MetaRefine'}):\n"
        "    print(type(get_model(spec)).__name__)\n"
        "print(type(get_datamodule({'class_path': 'ELPV'})).__name__)\n"
    )
    assert out.split() == ["MetaRefine"] * 4 + ["ELPV"]


def test_environment_variable_switches_it_off():
    python(
        "import sys\n"
        "assert 'anomalib_metarefine._startup' not in sys.modules\n"
        "from anomalib.models import list_models\n"
        "assert 'meta_refine' not in list_models()\n",
        ANOMALIB_PLUGINS="off",
    )


@pytest.fixture
def plugins(tmp_path):
    """A folder with a distribution whose entry points are odd in every way that we know."""
    info = tmp_path / "odd_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[anomalib.models]\nMissing = no_such_module:Missing\nModule = odd_module\nExits = odd_exit:Exits\n"
        "Stops = odd_stop:Stops\nNumber = odd_module:NUMBER\nNoName = odd_module:NoName\n"
    )
    (tmp_path / "odd_module.py").write_text("NUMBER = 3\n")
    (tmp_path / "odd_exit.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "odd_stop.py").write_text("class Stop(BaseException): pass\nraise Stop\n")
    return tmp_path


def test_an_odd_plugin_is_a_warning(plugins):
    out = python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "told = [str(w.message) for w in caught if 'left out' in str(w.message)]\n"
        "print(sorted(message.split()[2] for message in told))\n"
        "assert anomalib.models.MetaRefine\n",
        PYTHONPATH=os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")]),
    )
    # Others may be left out too, in an environment with broken plugins of its own.
    for name in ("Exits", "Missing", "Module", "NoName", "Number", "Stops"):
        assert f"'{name}'" in out


@pytest.mark.parametrize("error", ["SystemExit(3)", "ValueError('no')", "BaseException()"])
def test_a_hook_that_fails_leaves_python_as_it_is(tmp_path, error):
    line = (Path(__file__).parents[1] / "anomalib_metarefine_plugins.pth").read_text()
    (tmp_path / "hook.pth").write_text(line)
    (tmp_path / "anomalib_metarefine").mkdir()
    (tmp_path / "anomalib_metarefine" / "__init__.py").touch()
    (tmp_path / "anomalib_metarefine" / "_startup.py").write_text(f"print('tried')\nraise {error}\n")
    code = f"import sys, site; sys.path.insert(0, {str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r}); print('on')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "ANOMALIB_PLUGINS"},
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["tried", "on"], "")


def test_start_up_imports_nothing_but_the_hook():
    names = "import sys; print(*sys.modules)"
    added = set(python(names).split()) - set(python(names, ANOMALIB_PLUGINS="off").split())
    assert added == {"anomalib_metarefine", "anomalib_metarefine._startup"}


def test_a_plugin_that_imports_its_host_first(plugins):
    """Half imported when the hook meets it; on a stand-in for anomalib, which is enough for this and quick."""
    for room in ("models", "data"):
        (plugins / "anomalib" / room).mkdir(parents=True)
        (plugins / "anomalib" / room / "__init__.py").write_text("ALLOWED_MODULES = {'anomalib'}\n")
    (plugins / "late_plugin.py").write_text("from anomalib import models\nclass Late: pass\n")
    with (plugins / "odd_plugin-1.0.dist-info" / "entry_points.txt").open("a") as points:
        points.write("Late = late_plugin:Late\n")
    package = Path(__file__).parents[1]
    out = python(
        f"import sys; sys.path[:0] = [{str(plugins)!r}, {str(package)!r}]\n"
        "import late_plugin, anomalib.models as host\n"
        "assert host.Late is late_plugin.Late\n"
        "assert 'late_plugin' in host.ALLOWED_MODULES\n"
        "print(type(host).__name__)\n"
    )
    assert out.split() == ["module"]


def test_help_is_quick_and_imports_no_torch():
    python(
        "import sys\n"
        "from anomalib_metarefine.cli import build_parser\n"
        "build_parser().format_help()\n"
        "assert 'torch' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "first", ["anomalib_metarefine.model.lightning_model", "anomalib_metarefine.data.contamination"]
)
def test_whichever_of_our_modules_comes_first(first):
    python(
        f"import {first}\n"
        "import anomalib.models, anomalib.data\n"
        "from anomalib_metarefine import ELPV, MetaRefine\n"
        "assert 'meta_refine' in anomalib.models.list_models()\n"
        "assert anomalib.models.MetaRefine is MetaRefine\n"
        "assert anomalib.data.ELPV is ELPV\n"
        "assert 'anomalib_metarefine' in anomalib.models.ALLOWED_MODULES\n"
        "assert type(anomalib.models).__name__ == type(anomalib.data).__name__ == 'module'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["off", "on"])
def test_with_the_patch_for_upstream_anomalib_needs_no_hook(tmp_path, switch):
    source = Path(importlib.util.find_spec("anomalib").submodule_search_locations[0])
    shutil.copytree(source, tmp_path / "src/anomalib")
    patch = Path(__file__).parents[1] / "docs/examples/upstream.patch"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    answer = python(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'src')!r})\n"
        "from anomalib.models import list_models; from anomalib.data import ELPV\n"
        "print(sys.modules['anomalib'].__file__, 'meta_refine' in list_models(), ELPV.__module__)",
        ANOMALIB_PLUGINS=switch,
    )
    assert answer.split() == [str(tmp_path / "src/anomalib/__init__.py"), "True", "anomalib_metarefine.data.elpv"]
