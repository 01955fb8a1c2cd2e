import re

from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.benchmark import markdown
from anomalib_metarefine.benchmark.report import latex
from anomalib_metarefine.benchmark.report.typeset import Cell, Table

TABLE = Table(
    "Share, %",
    ["data_set", "Model, plain", "x|y"],
    [
        ["a_b", Cell("91.2 ± 0.4", bold=True), Cell("-", note="no <network>")],
        ["__c__", Cell("-", note="no <network>"), Cell("-", note="other")],
    ],
    labels=1,
    text="100 % & more.",
    breaks={0, 1},
)
BACK = {
    "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">",
    "textbar": "|",
}  # fmt: skip


def unescape(text):
    """What LaTeX prints."""
    text = re.sub(r"\\(text\w+)\{\}", lambda match: f"\0{ord(BACK[match[1]])}\0", text)
    text = text.replace(r"$\pm$", "±").replace("-{}-", "--").replace("-{}-", "--")
    text = text.replace("{[}", "[").replace("{*}", "*")
    text = re.sub(r"\\([&%$#_{}])", r"\1", text)
    return re.sub(r"\0(\d+)\0", lambda match: chr(int(match[1])), text)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=30))
def test_latex_prints_any_text_as_it_is(text):
    escaped = latex.escape(text)
    assert unescape(escaped) == " ".join(text.split())
    # Nothing that is left is a command, a comment, a column or the argument of a row's end.
    bare = re.sub(r"\\(text\w+\{\}|[&%$#_{}])|\$\\pm\$|\{\[\}|\{\*\}|-\{\}", "", escaped)
    assert not set(bare) & set("\\&%$#_{}~^<>|[*")
    assert "--" not in escaped


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30))
def test_markdown_cells_stay_cells(text):
    escaped = markdown.escape(text)
    assert re.sub(r"\\(.)", r"\1", escaped) == text
    assert not re.search(r"(?<!\\)(\\\\)*[|<*`\[]", escaped)


def test_dashes_stay_apart():
    assert latex.escape("bench --root a---b") == "bench -{}-root a-{}-{}-b"


def test_markdown_leaves_names_alone():
    assert markdown.escape("mvtec_ad") == "mvtec_ad"
    assert markdown.escape("__init__\n missing") == r"\_\_init\_\_ missing"


def test_a_table_in_markdown():
    assert TABLE.markdown(3) == (
        "### Share, %\n\n100 % & more.\n\n"
        "| data_set | Model, plain | x\\|y |\n| --- | --- | --- |\n"
        "| a_b | **91.2 ± 0.4** | -<sup>a</sup> |\n| \\_\\_c\\_\\_ | -<sup>a</sup> | -<sup>b</sup> |\n\n"
        "<sup>a</sup> no \\<network>  \n<sup>b</sup> other\n"
    )


def test_a_table_in_latex():
    text = TABLE.latex()
    assert r"\caption{Share, \%. 100 \% \& more.}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"data\_set & \shortstack[r]{Model,\\plain} & x\textbar{}y \\" in text
    assert r"a\_b & \textbf{91.2 $\pm$ 0.4} & -$^{a}$ \\" in text
    assert text.count(r"\midrule") == 2  # below the header, above the second row
    assert r"$^{a}$ no \textless{}network\textgreater{}\par" in text
    check_structure(text)


def check_structure(text):
    """Environments and braces close, and every row has as many columns as the table."""
    opened = []
    for command, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if command == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert rows
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1


def test_long_tables_go_on_on_the_next_page():
    rows = [[str(row), Cell("1", note=f"note {row // 50}")] for row in range(100)]
    text = Table("Long", ["row", "one"], rows, labels=1, breaks={50}).latex()
    check_structure(text)
    assert text.count(r"\begin{table}") == 3
    assert text.count("(continued)") == 2
    assert text.count("$^{a}$ note") == 3  # the notes of each part, below it
    assert text.count(r"\midrule") == 4
