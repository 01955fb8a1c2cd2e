import numpy as np
import pandas as pd
import pytest
import torch

from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.features.store import FeatureStore
from studies import episodic
from studies.episodic import aggregate, draw_supports, main, summarise, support_distances


def test_supports_have_their_size_and_are_different():
    supports = draw_supports(40, 8, seed=0)
    assert supports.sum(1).tolist() == [8] * 20
    assert len(np.unique(supports, axis=0)) == 20
    assert (supports == draw_supports(40, 8, seed=0)).all()
    assert (supports != draw_supports(40, 8, seed=1)).any()


def test_aggregates_only_the_episodes_outside():
    scores = np.array([[1.0, 9], [2, 4], [3, 6], [99, 8]])
    supports = np.array([[False, True], [False, False], [False, False], [True, False]])
    found = aggregate(scores, supports)
    assert found["mean"] == pytest.approx([2, 6])
    assert found["lower quartile"] == pytest.approx([1.5, 5])
    assert found["spread"] == pytest.approx([np.std([1, 2, 3]), np.std([4, 6, 8])])


def test_distance_to_a_support_is_that_to_the_nearest_of_its_images():
    torch.manual_seed(0)
    embeddings = torch.randn(6, 4, 80)
    store = FeatureStore()
    store.add([f"{i}.png" for i in range(6)], embeddings)
    neighbours = NearestImages(store, range(6), (2, 2), torch.Generator().manual_seed(0), window=0, nearest=6)
    supports = np.array([[True, True, False, False, True, False], [False, False, True, False, False, False]])
    found = support_distances(neighbours, supports)

    sample = embeddings.half().float().flatten(0, 1)
    axes = torch.linalg.eigh(torch.cov(sample.T)).eigenvectors.flip(1)[:, :64]
    projected = (embeddings.half().float() - sample.mean(0)) @ axes
    for episode, support in enumerate(supports):
        for image in np.flatnonzero(~support):
            each = (projected[image] - projected[torch.from_numpy(support)]).norm(dim=-1)  # [support x P]
            assert found[episode, image] == pytest.approx(each.amin(0).max().item(), rel=2e-3)


@pytest.fixture
def few(monkeypatch):
    """Few episodes on features made of noise, with a few patches far off where the image has a defect."""

    def features(datamodule, _data_set):
        source = datamodule.datamodule
        source.setup()
        paths = sorted([*source.train_data.samples.image_path, *source.test_data.samples.image_path])
        embeddings = torch.randn(len(paths), 36, 12, generator=torch.Generator().manual_seed(0))
        for path, image in zip(paths, embeddings, strict=True):
            if "blob" in path:
                image[torch.randperm(36)[:3]] += 4 * torch.randn(12)
        store = FeatureStore()
        store.add(paths, embeddings)
        return store, (6, 6)

    torch.manual_seed(0)
    monkeypatch.setattr(episodic, "all_features", features)
    monkeypatch.setattr(episodic, "EPISODES", 4)


def test_compares_every_score_and_goes_on_where_it_stopped(few, parts, tmp_path, capsys):
    out = tmp_path / "episodic.csv"
    arguments = ["--out", str(out), "--data", f"{parts}:24:parts", "--contamination", "0.2", "--seeds", "0"]
    assert main([*arguments, "--support", "6"]) == 0
    rows = pd.read_csv(out)
    assert len(rows) == 8
    assert set(zip(rows.images, rows.dirty, strict=True)) == {(24, 5)}
    assert rows.AUROC[~rows.score.str.endswith("spread")].min() > 0.9
    assert (rows.seconds > 0).all()

    rows.drop(index=[1, 4]).to_csv(out, index=False)
    capsys.readouterr()
    torch.manual_seed(0)
    assert main([*arguments, "--support", "6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    again = pd.read_csv(out).set_index("score").AUROC
    assert again[rows.score].tolist() == rows.AUROC.tolist()  # the same supports, the same steps
    assert main([*arguments, "--support", "6"]) == 0
    assert capsys.readouterr().out == ""


def test_says_what_cannot_be_had(parts, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "episodic.csv"), "--seeds", "0", "--data"]
    assert main([*arguments, f"{parts}:24:parts", "--contamination", "0.2"]) == 0
    assert "24 training images are too few for supports of 16" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2


def test_summary_keeps_the_order_of_the_table():
    row = {"data": "b", "contamination": 0.2, "seed": 0, "score": "flow", "AUROC": 0.9}
    rows = [row, row | {"seed": 1, "AUROC": 0.7}, row | {"data": "a", "AUROC": 0.5}, row | {"score": "best"}]
    assert summarise(pd.DataFrame(rows)).splitlines() == [
        "| score | b, 20% | a, 20% |",
        "| --- | --- | --- |",
        "| flow | 0.800 ± 0.141 | 0.500 |",
        "| best | 0.900 |  |",
    ]
