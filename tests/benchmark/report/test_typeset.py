from anomalib_metarefine.benchmark.report.typeset import Notes, Table

NOTES = Notes()
TABLE = Table(
    "Made up, 100 %",
    [{"data": NOTES.mark("a_b", "no | network"), "dirty": "10 %"}, {"data": "c", "dirty": "x | y", "late": "1"}],
    "What to know.",
    NOTES,
    [{"dirty"}, set()],
)


def test_markdown():
    lines = TABLE.markdown(level=3).splitlines()
    assert lines[:3] == ["### Made up, 100 %", "", "What to know."]
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines[4:8]]
    assert cells[0] == ["data", "dirty", "late"]
    assert cells[2:] == [["a_b [1]", "**10 %**", ""], ["c", "x / y", "1"]]
    assert lines[-1] == "[1] no | network"
