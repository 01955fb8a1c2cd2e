from pathlib import Path

import pytest
import yaml

from anomalib_metarefine.benchmark.config import BenchConfig
from anomalib_metarefine.benchmark.grid import plan

SHIPPED = Path(__file__).parents[2] / "configs/bench"
SMALL = {
    "models": {"PaDiM": {"class_path": "Padim", "init_args": {"n_features": 10}}, "Dfm": None},
    "data": {"parts": {"class_path": "Folder", "init_args": {"root": "parts"}}},
}


def read(tmp_path, **changes):
    content = {key: value for key, value in (SMALL | changes).items() if value is not ...}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return BenchConfig.read(tmp_path / "bench.yaml")


def test_defaults(tmp_path):
    config = read(tmp_path)
    padim, dfm = config.models
    assert (padim.spec.name, padim.spec.class_path, padim.spec.init_args) == ("PaDiM", "Padim", {"n_features": 10})
    assert dfm.spec.class_path == "Dfm"
    assert padim.contamination == (0.0, 0.2, 0.4)
    assert padim.trainings == ("raw", "curated", "clean")
    assert (config.seeds, config.protocols) == ((0, 1, 2), ("replace",))
    assert config.data[0].image_size == (256, 256)


def test_not_every_model_need_run_everywhere(tmp_path):
    models = {"Padim": {"trainings": ["clean"]}, "Dfm": None}
    padim, dfm = read(tmp_path, models=models, contamination=[0, 0.1, 0.3], only={0.1: ["Dfm"]}).models
    assert (padim.contamination, padim.trainings) == ((0.0, 0.3), ("clean",))
    assert (dfm.contamination, dfm.trainings) == ((0.0, 0.1, 0.3), ("raw", "curated", "clean"))


def test_categories_by_grid(tmp_path):
    arguments = {"root": "mvtec", "category": {"grid": ["bottle", "cable"]}}
    config = read(tmp_path, data={"mvtec": {"class_path": "MVTecAD", "init_args": arguments, "image_size": [64, 96]}})
    assert [(one.name, one.category, one.init_args) for one in config.data] == [
        ("mvtec", "bottle", {"root": "mvtec", "category": "bottle"}),
        ("mvtec", "cable", {"root": "mvtec", "category": "cable"}),
    ]
    assert config.data[1].image_size == (64, 96)
    assert {one.init_args["root"] for one in config.at({"mvtec": "there"}).data} == {"there"}
    assert {one.init_args["root"] for one in config.data} == {"mvtec"}


def test_models_may_stand_in_a_file_of_their_own(tmp_path):
    (tmp_path / "models.yaml").write_text("Padim: {batch_size: 4}\n")
    (entry,) = read(tmp_path, models="models.yaml").models
    assert entry.spec.batch_size == 4


def test_a_part_of_the_grid(tmp_path):
    config = read(tmp_path).select(models=["Dfm"], seeds=[7])
    assert [entry.spec.name for entry in config.models] == ["Dfm"]
    assert config.seeds == (7,)
    with pytest.raises(ValueError, match="no model 'Dmf'. Choose from PaDiM, Dfm"):
        config = read(tmp_path).select(models=["Dmf"])
    with pytest.raises(ValueError, match="no data set 'part'. Choose from parts"):
        read(tmp_path).at({"part": "there"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contaminations": [0.2]}, "no key of the file 'contaminations'. Choose from"),
        ({"contamination": [20]}, r"contamination must be shares in \[0, 1\), found \[20\]"),
        ({"contamination": 0.2}, "contamination must be a list, found 0.2"),
        ({"protocols": ["swap"]}, "no value of protocols 'swap'. Choose from replace, add"),
        ({"seeds": ["a"]}, "seeds must be integers"),
        ({"models": ...}, "models must be a mapping .* found nothing"),
        ({"data": {"parts": {"clas_path": "Folder"}}}, "no key of data: parts 'clas_path'"),
        ({"data": {"parts": {"class_path": "Folder", "image_size": 256}}}, "parts: image_size must be a list"),
        ({"data": {"parts": {"class_path": "Folder", "image_size": [256]}}}, "must be height and width"),
        ({"only": {0.1: ["Dfm"]}}, "no share of contamination 0.1. Choose from 0.0, 0.2, 0.4"),
        ({"only": {0.2: ["Padim"]}}, "no model 'Padim'. Choose from PaDiM, Dfm"),
        ({"models": {"Padim": {"trainings": ["dirty"]}}}, "models: Padim: trainings 'dirty'"),
        ({"models": {"Padim": {"init_args": 3}}}, "models: Padim: init_args must be a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"bench.yaml: .*{message}"):
        read(tmp_path, **changes)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"configs/bench/ has some"):
        BenchConfig.read(tmp_path / "bench.yaml")


@pytest.mark.parametrize(
    "path", sorted(set(SHIPPED.glob("*.yaml")) - {SHIPPED / "models.yaml"}), ids=lambda path: path.stem
)
def test_shipped_configurations_can_be_read(path):
    config = BenchConfig.read(path)
    assert {"MetaRefine", "PatchCore", "PaDiM"} <= {entry.spec.name for entry in config.models}
    assert sum(len(cells) for data in config.data for _, cells in plan(config, data)) > 0
    if path.stem == "mvtec_ad":
        assert len(config.data) == 15
