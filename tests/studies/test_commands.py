import importlib
import re
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"
COMMANDS = sorted(path.stem for path in STUDIES.glob("*.py") if "__main__" in path.read_text())
WITH_OPTIONS = [name for name in COMMANDS if "argparse" in (STUDIES / f"{name}.py").read_text()]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_it_can_be_asked_for_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(f"studies.{name}").main()
    assert "--" in capsys.readouterr().out


def test_the_table_names_every_study_and_its_rows_are_there():
    table = (STUDIES / "README.md").read_text()
    assert set(re.findall(r"`python -m studies\.(\w+)", table)) == set(COMMANDS)
    files = re.findall(r"\]\((results/[\w.]+)\)", table)
    assert files
    assert all((STUDIES / file).is_file() for file in files)
