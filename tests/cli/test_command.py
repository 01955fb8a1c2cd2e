"""What all commands have in common."""

import argparse
import inspect
import logging
import subprocess
import sys

import pytest

from anomalib_metarefine import progress
from anomalib_metarefine.cli import _COMMANDS, build_parser, main
from anomalib_metarefine.cli.command import Command
from anomalib_metarefine.settings import Settings


@pytest.fixture
def command(monkeypatch):
    """A command that does what it is given."""

    def add(run):
        monkeypatch.setitem(_COMMANDS, "try", Command("s", "d", lambda parser: None, run))

    return add


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--print-completion", "bash"], ["curate", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = "import sys; from anomalib_metarefine.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'anomalib', 'pandas', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_every_help_can_be_shown_and_exit_codes_are_listed(capsys):
    for name in _COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        told = capsys.readouterr().out
        assert "--quiet" in told
        assert "None" not in told
        assert told.count("default: auto") <= 1
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {code} " in told for code in (0, 1, 2, 130))


def test_completion_is_a_script(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = tmp_path / "metarefine"
    script.write_text(capsys.readouterr().out)
    shown = subprocess.run(
        [
            "bash",
            "-c",
            f'source {script}; COMP_WORDS=(metarefine cur); COMP_CWORD=1; _shtab_metarefine; echo "${{COMPREPLY[@]}}"',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "curate\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["curate"], ["verify", "x", "--limit", "0"]])
def test_a_wrong_command_line_is_told_like_any_other_input(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    told = capsys.readouterr().err
    assert told.startswith("metarefine: ")
    assert told.count("\n") == 1
    assert "--help" in told


@pytest.mark.parametrize(
    "arguments",
    [
        "calibrate NO --out x.ckpt",
        "calibrate HERE --out x.ckpt --data NO",
        "export NO --out x",
        "export HERE --out x --data NO",
        "verify NO --ckpt HERE --data HERE",
        "verify HERE --ckpt NO --data HERE",
        "verify HERE --ckpt HERE --data NO",
        "verify HERE --ckpt HERE --data HERE --out NO/x.json",
        "convert NO --to x",
        "bench NO",
        "bench-report NO --out x",
        "meta-train --data NO --out x.ckpt",
        "meta-train --data NO@64x64 --out x.ckpt",
        "demo --out x --mvtec NO",
        "demo --out x --mvtec HERE",
    ],
)
def test_what_is_not_there_is_told_before_heavy_imports(arguments, tmp_path, monkeypatch, capsys):
    for name in ("torch", "anomalib", "timm", "cv2", "numpy"):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for module in [module for module in sys.modules if module.startswith("anomalib_metarefine.")]:
        if not module.startswith(("anomalib_metarefine.cli", "anomalib_metarefine.settings")):
            monkeypatch.delitem(sys.modules, module)
    texts = [text.replace("NO", str(tmp_path / "no")).replace("HERE", str(tmp_path)) for text in arguments.split()]
    assert main(texts) == 2
    told = capsys.readouterr().err
    assert told.startswith("metarefine: There is no ")
    assert "Expected" in told
    assert told.count("\n") == 1


def test_defaults_are_those_of_the_functions():
    from anomalib_metarefine.curation.curate import curate
    from anomalib_metarefine.model.initialisation import learn_shared

    parser = build_parser()
    for arguments, function in (
        (["curate", "x", "--out", "x"], curate),
        (["meta-train", "--data", "x", "--out", "x"], learn_shared),
    ):
        given = parser.parse_args(arguments)
        wanted = inspect.signature(function).parameters
        assert {name: getattr(given, name) for name in ("backbone", "seed", "batch_size")} == {
            name: wanted[name].default for name in ("backbone", "seed", "batch_size")
        }
    assert parser.parse_args(["demo"]).rule == Settings().rule


def test_quiet_shows_no_progress(command, capsys):
    def run(options: argparse.Namespace) -> int:
        with progress.progress_bars(enabled=True) as bars:
            print(type(bars).__name__, bars.disable)
        return 0

    command(run)
    assert main(["try", "--quiet"]) == 0
    assert main(["try"]) == 0
    assert capsys.readouterr().out == "Progress True\n_Lines True\n"


def test_verbose_says_more(command, capsys):
    def run(options: argparse.Namespace) -> int:
        print(logging.getLogger("anomalib_metarefine.x").isEnabledFor(logging.INFO))
        raise ValueError("no such\nthing")

    command(run)
    assert main(["try"]) == 2
    first = capsys.readouterr()
    assert (first.out, first.err) == ("False\n", "metarefine: no such thing\n")
    assert main(["try", "--verbose"]) == 2
    second = capsys.readouterr()
    assert second.out == "True\n"
    assert "Traceback" in second.err
    assert second.err.endswith("metarefine: no such thing\n")


def test_imports_of_anomalib_say_nothing():
    code = "from anomalib_metarefine.cli import _set_up_messages\n_set_up_messages(False)\nimport anomalib.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FutureWarning" not in done.stderr
