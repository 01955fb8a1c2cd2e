"""What a plain `pip install` promises; every check runs in a Python of its own."""

import os
import subprocess
import sys
import time

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


def test_importing_our_names_first_registers_too():
    python(
        "from anomalib_metarefine.model.lightning_model import MetaRefine\n"
        "import anomalib.models, anomalib.data\n"
        "from anomalib_metarefine import ELPV\n"
        "assert anomalib.models.MetaRefine is MetaRefine\n"
        "assert anomalib.data.ELPV is ELPV\n"
        "assert 'anomalib_metarefine' in anomalib.models.ALLOWED_MODULES\n"
    )


def test_environment_variable_switches_it_off():
    python(
        "import sys\n"
        "assert 'anomalib_metarefine._startup' not in sys.modules\n"
        "from anomalib.models import list_models\n"
        "assert 'meta_refine' not in list_models()\n",
        ANOMALIB_PLUGINS="off",
    )


def test_a_broken_plugin_is_a_warning(tmp_path):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[anomalib.models]\nBroken = no_such_module:Broken\n")
    out = python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import anomalib.models\n"
        "print([str(w.message) for w in caught if 'Broken' in str(w.message)])\n"
        "assert anomalib.models.MetaRefine\n",
        PYTHONPATH=str(tmp_path),
    )
    assert "could not be loaded and is left out" in out


def test_start_up_imports_nothing_heavy():
    out = python(
        "import sys; print(len(sys.modules), sorted(m for m in sys.modules if 'anomalib' in m or m == 'typing'))"
    )
    assert out.split(maxsplit=1)[1].strip() == "['anomalib_metarefine', 'anomalib_metarefine._startup']"


def test_start_up_costs_under_five_milliseconds():
    def seconds(**environment: str) -> float:
        begin = time.perf_counter()
        python("pass", **environment)
        return time.perf_counter() - begin

    pairs = [(seconds(), seconds(ANOMALIB_PLUGINS="off")) for _ in range(15)]
    # The fastest of each: what else the machine does only ever adds.
    assert min(on for on, _ in pairs) - min(off for _, off in pairs) < 0.005


def test_help_is_quick_and_imports_no_torch():
    python(
        "import sys\n"
        "from anomalib_metarefine.cli import build_parser\n"
        "build_parser().format_help()\n"
        "assert 'torch' not in sys.modules\n"
    )
