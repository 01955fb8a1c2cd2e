import pandas as pd

from anomalib_metarefine.benchmark.report.cells import checked, scenarios
from studies.published import HERE, published_table, read_published
from tests.benchmark.report.made_up import results
from tests.benchmark.report.test_tables import note


def test_every_published_figure_has_its_data_set_and_protocol():
    content = read_published()
    for figure in content["figures"]:
        assert figure["data_set"] in content["data_sets"]
        assert figure["protocol"].partition(":")[0] in content["protocols"]
        assert 0 <= figure["contamination"] <= 0.5
        assert 50 < figure["value"] < 100
    (meds,) = [figure for figure in content["figures"] if figure["method"] == "MeDS"]
    assert (meds["protocol"], meds["contamination"]) == ("meds:nr40", 0.243)  # not 40 % of the training set


def test_ours_beside_published_figures():
    categories = [("mvtec_ad", str(number)) for number in range(15)]
    whole = results(models=("MetaRefine", "SoftPatch"), data=categories, shares=(0.1,), seeds=(0,), image_AUROC=0.9)
    some = results(models=("MetaRefine",), data=categories[:2], shares=(0.5,), seeds=(0,), image_AUROC=0.8)
    ((scenario, part),) = scenarios(checked(pd.concat([whole, some]))).items()
    table = published_table(part, scenario)
    lines = {(line["method"], line["data"], line["protocol"].partition(" [")[0]): line for line in table.lines}
    soft = lines["SoftPatch", "MVTec AD", "softpatch:0.1"]
    assert (soft["published"], soft[HERE]) == ("98.65", "90.0")
    assert note(table, soft["MetaRefine"]) == "Over mvtec_ad (15 categories); seeds 0."
    rad = lines["RAD", "MVTec AD", "rad:0.5"]
    assert (rad[HERE], rad["MetaRefine"].split()[0]) == ("", "80.0")
    assert note(table, rad["MetaRefine"]).endswith("Of 15 categories, so not comparable.")
    empty = lines["RAD", "KolektorSDD2", "clean"]["MetaRefine"]
    assert "`metarefine bench configs/bench/ksdd2.yaml --root ksdd2=DIR`" in note(table, empty)
