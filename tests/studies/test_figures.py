import re

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.benchmark.report.cells import REFINED, UNREFINED, checked, scenarios
from studies import figures
from studies.drawing import Picture, Style, canvas, legend, look
from tests.benchmark.report.made_up import DATA, MODELS, failed, results

ROWS = results(models=MODELS[:4], shares=(0.0, 0.2, 0.4), seeds=(0, 1))
ALL = (
    figures.paper_bars,
    figures.by_class,
    figures.overall,
    figures.against_contamination,
)


@pytest.fixture(autouse=True)
def _look():
    with look():
        yield


def one_scenario(rows):
    (part,) = scenarios(checked(rows)).values()
    return part


def draw(function, rows):
    part = one_scenario(rows)
    return list(function(part, Style.of(part)))


def legend_of(picture):
    return [text.get_text() for text in picture.figure.legends[0].get_texts()]


def outside(picture):
    """Texts that reach over the edge of the figure, or lie on another."""
    picture.figure.draw_without_rendering()
    whole = picture.figure.bbox
    texts = []
    for axes in picture.figure.axes:
        if axes.axison:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += picture.figure.legends[0].get_texts()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    found = [name for name, box in boxes if not (whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0)]
    for place, (name, box) in enumerate(boxes):
        found += [(name, other) for other, its in boxes[:place] if box.shrunk(0.9, 0.9).overlaps(its.shrunk(0.9, 0.9))]
    return found


@pytest.mark.parametrize("function", ALL)
def test_nothing_is_cut_off_and_nothing_overlaps(function):
    # Seven models, four data sets, four contaminations, and names as long as real ones.
    rows = results(data=[*DATA[:1], *DATA[3:], ("MVTec AD", "")], seeds=(0,))
    for picture in draw(function, rows):
        assert outside(picture) == []


@pytest.mark.parametrize("function", [figures.paper_bars, figures.against_contamination])
def test_one_data_set_is_enough(function):
    (picture,) = draw(function, results(data=DATA[:1], seeds=(0,)))
    assert outside(picture) == []


@pytest.mark.parametrize("function", ALL)
def test_what_is_missing_is_said(function):
    nothing = failed(ROWS, "no network", backbone="a_backbone")
    for picture in draw(function, nothing):
        assert picture.figure is None
        assert picture.caption


def test_bars_of_the_paper():
    rows = ROWS[ROWS.data.isin(["made-up-cells", "made-up-belts"])]
    (picture,) = draw(figures.paper_bars, failed(rows, "too few", data="made-up-belts", contamination=0.4))
    assert legend_of(picture) == ["clean", "corrupted", "refined"]
    upper, lower = picture.figure.axes
    assert (upper.get_title(), lower.get_title()) == ("20 % dirty", "40 % dirty")
    # clean, corrupted, refined; made-up-belts, made-up-cells
    heights = np.reshape([bar.get_height() for bar in lower.patches], (3, 2))
    assert np.isnan(heights[:, 0]).all()
    for height, (model, training) in zip(
        heights[:, 1], [(UNREFINED, "clean"), (UNREFINED, "raw"), (REFINED, "raw")], strict=True
    ):
        cell = rows[(rows.data == "made-up-cells") & (rows.contamination == 0.4) & (rows.model == model)]
        assert height == pytest.approx(100 * cell[cell.training == training].image_AUROC.mean())


def test_bars_need_all_three():
    (picture,) = draw(figures.paper_bars, ROWS[ROWS.model != UNREFINED])
    assert picture.figure is None
    assert "corrupted: MetaRefine, unrefined, training raw" in picture.caption


def test_every_class_at_every_contamination():
    pictures = draw(figures.by_class, ROWS)
    assert [picture.name for picture in pictures] == ["by_class_0", "by_class_20", "by_class_40"]
    axes = pictures[2].figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[::-1] == ["flat", "made-up-belts", "made-up-cells", "made-up-parts/bolt", "made-up-parts/nut"]
    assert legend_of(pictures[2]) == list(MODELS[:4])


def test_the_average_is_over_common_cells():
    (picture,) = draw(figures.overall, failed(ROWS, "too few", data="flat", contamination=0.4, model="DFM"))
    assert "At 0 %, 20 %: flat, made-up-belts" in picture.caption
    assert "At 40 %: made-up-belts, made-up-cells, made-up-parts (2 categories)" in picture.caption
    bars = picture.figure.axes[0].patches
    assert len(bars) == 4 * 3
    used = ROWS[
        (ROWS.training == "raw") & (ROWS.model == REFINED) & (ROWS.contamination == 0.4) & (ROWS.data != "flat")
    ]
    expected = used.groupby(["data", "category"]).image_AUROC.mean().groupby("data").mean().mean()
    assert bars[2].get_height() == pytest.approx(100 * expected)


def test_bars_begin_at_chance_or_below_the_worst():
    (picture,) = draw(figures.overall, ROWS)
    assert picture.figure.axes[0].get_ylim() == (50, 100)
    (picture,) = draw(figures.overall, ROWS.assign(image_AUROC=ROWS.image_AUROC - 0.4))
    assert picture.figure.axes[0].get_ylim()[0] < 50


def test_curves_of_raw_and_curated_and_their_average():
    rows = failed(ROWS, "too few", data="flat", contamination=0.4, model="DFM")
    (picture,) = draw(figures.against_contamination, rows)
    panels = {axes.get_title(): axes for axes in picture.figure.axes if axes.get_title()}
    assert list(panels) == ["flat", "made-up-belts", "made-up-cells", "made-up-parts", "average"]
    lines = [line for line in panels["average"].get_lines() if len(line.get_xdata())]
    assert len(lines) == 2 * 4
    assert {line.get_linestyle() for line in lines} == {"-", "--"}
    # A line ends where a model could not be run, and then that data set is not in the average at all.
    assert sorted({len(line.get_xdata()) for line in panels["flat"].get_lines()} - {0}) == [2, 3]
    assert "everywhere: made-up-belts, made-up-cells, made-up-parts (2 categories)" in picture.caption
    assert len(panels["flat"].collections) == 4  # bands of the raw trainings
    assert legend_of(picture) == [*MODELS[:4], "trained raw", "trained curated"]


def test_no_average_without_common_cells():
    rows = ROWS[ROWS.data.isin(["flat", "made-up-cells"])]
    rows = rows[(rows.data == "flat") == (rows.model == "DFM")]
    (picture,) = draw(figures.against_contamination, rows)
    assert [axes.get_title() for axes in picture.figure.axes] == ["flat", "made-up-cells"]
    assert "There is no average" in picture.caption


def test_models_can_be_told_apart_in_grey():
    style = Style(tuple(f"model {place}" for place in range(12)))
    lines = [style.line(model) for model in style.models]
    assert len({look["marker"] for look in lines}) == 12
    assert len({(look["color"], look.get("markerfacecolor")) for look in lines}) == 12
    assert len({style.bar(model)["hatch"] for model in style.models[:10]}) == 10


def test_the_same_bytes_every_time_whatever_the_user_has_set(tmp_path):
    def save(folder):
        folder.mkdir()
        figure, ((axes,),) = canvas(3, 2)
        axes.bar([0], [1], hatch="//", label="bar")
        axes.errorbar([0], [1], yerr=[0.5], marker="o", label="line")
        legend(figure, axes)
        paths = Picture("one", "One", "", figure).save(folder)
        return [path.read_bytes() for path in paths]

    first = save(tmp_path / "a")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None}), look():
        assert save(tmp_path / "b") == first
    assert b"<text" in first[0]  # text stays text
    assert not re.search(rb"<dc:date>|Matplotlib v", first[0])
    assert Image.open(tmp_path / "a/one.png").info.keys() <= {"dpi"}


def test_no_figure_no_files(tmp_path):
    assert Picture("none", "None", "There is nothing to show.").save(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
