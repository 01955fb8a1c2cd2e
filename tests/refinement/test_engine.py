import numpy as np
import pytest
import torch
from rich.progress import Progress

from anomalib_metarefine.density.flow import bits_per_dimension
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.meta.episodes import PatchBatch
from anomalib_metarefine.refinement import engine as fitting
from anomalib_metarefine.refinement import patches
from anomalib_metarefine.refinement.engine import DensityFitter, FitSettings, flow_loss, new_flow, trainable
from anomalib_metarefine.refinement.rules import PosteriorFence
from anomalib_metarefine.robust import lower_side_scale

pytestmark = pytest.mark.usefixtures("patches_of_few_images")

GRID = (4, 5)
SETTINGS = {"dimensions": 6, "hidden": 8, "meta_steps": 1, "batch_patches": 64, "adaptation_steps": 1}


@pytest.fixture
def store():
    """Aligned images that are ever noisier, four of them with a defect in one patch, at a place of its own."""
    generator = torch.Generator().manual_seed(0)
    places = 3 * torch.randn(20, 8, generator=generator)
    noise = torch.linspace(0.5, 2, 40).view(-1, 1, 1)
    embeddings = places + noise * torch.randn(40, 20, 8, generator=generator)
    for image in range(4):
        embeddings[5 * image, 6 + image] += 12
    store = FeatureStore()
    store.add([f"{i:02d}.png" for i in range(40)], embeddings)
    return store


def fitted(store, known=None, **changes):
    settings = FitSettings(**SETTINGS | changes)
    generator = torch.Generator().manual_seed(0)
    fitter = DensityFitter(store, new_flow(8, settings, 0), GRID, settings, generator, Progress(disable=True))
    _, refinement = fitter.fit(known)
    return fitter, refinement


def test_defective_patches_are_left_out_where_no_image_is_rejected(store):
    fitter, refinement = fitted(store, rule="share:0")
    assert all(refinement.kept)
    assert not any(fitter.learned[5 * image, 6 + image] for image in range(4))
    assert 4 * 6 / 800 <= refinement.unusual_patches < 0.25  # with their neighbours
    assert refinement.unusual_patches == pytest.approx(1 - fitter.learned.float().mean().item())


def test_all_patches_are_learned_where_images_are_rejected_or_the_fence_is_off(store):
    fitter, refinement = fitted(store, rule="count:4")
    assert not all(refinement.kept)
    assert fitter.learned.all()
    assert fitted(store, rule="share:0", patch_fence=0.0)[0].learned.all()
    assert fitted(store, rounds=0)[0].learned.all()


def test_likeness_changes_the_order_of_the_scores_only(store, monkeypatch):
    alone, by_score = fitted(store, likeness_weight=0.0, rounds=1, rule="share:0")
    _, by_both = fitted(store, rounds=1, rule="share:0")
    assert "likeness" not in alone.parts
    assert len(by_both.parts["likeness"]) == 40
    assert by_both.scores != by_score.scores
    assert sorted(by_both.scores) == pytest.approx(sorted(by_score.scores))
    monkeypatch.setattr(fitting, "FEWEST_IMAGES", 41)
    few, unchanged = fitted(store, rounds=1, rule="share:0")
    assert "likeness" not in few.parts
    assert unchanged.scores == by_score.scores


def test_likeness_counts_as_far_as_it_is_trusted_and_is_told_the_answers(store, monkeypatch):
    plain = fitted(store, likeness_weight=0.0, rounds=1, rule="share:0")[1].scores
    answers = []

    def trusted(trust):
        def likeness(_features, scores, known):
            answers.append(known)
            return np.arange(len(scores), dtype=float), trust

        monkeypatch.setattr(fitting, "likeness", likeness)
        return fitted(store, {3: True}, rounds=1, rule="share:0")[1].scores

    assert trusted(0.0) == plain
    assert trusted(1.0) != plain
    assert all(known == {3: True} for known in answers)


def test_few_images_are_learned_whole(store, monkeypatch):
    monkeypatch.setattr(patches, "FEWEST_IMAGES", 41)
    assert fitted(store, rule="share:0")[0].learned.all()


def test_what_a_person_rejects_does_not_count_as_standing_apart(store):
    fitter, refinement = fitted(store, {0: False, 39: True}, rule="share:0")
    assert refinement.kept == [False] + [True] * 39
    assert not any(fitter.learned[5 * image, 6 + image] for image in range(1, 4))
    assert fitter.learned[0].all()  # of an image that is not learned from anyway


def test_the_default_rule_is_told_answers_and_the_second_scale(store, monkeypatch):
    told = []

    def fence(_rule, scores, known, further):
        told.append((scores, known, further))
        return np.inf

    def trusted(trust, known=None):
        monkeypatch.setattr(fitting, "likeness", lambda _features, scores, _known: (np.sin(np.arange(40)), trust))
        return fitted(store, known, rule="auto", rounds=1)[1].parts

    monkeypatch.setattr(PosteriorFence, "fence", fence)
    answers = {0: False, 39: True}
    parts = trusted(1.0, answers)
    assert "combined" not in trusted(0.99)  # too little explained for a scale of its own
    (scores, known, (combined,)), (_, nothing_known, no_further_scale) = told
    assert known is answers
    np.testing.assert_array_equal(np.argsort(combined), np.argsort(scores))
    assert np.abs(combined - scores).max() > 0.1
    assert parts["combined"] == combined.tolist()
    assert (nothing_known, no_further_scale) == (None, [])


def test_rejected_images_teach_a_third_scale(store, monkeypatch):
    taught, told = [], []

    def resembling(_features, scores, kept, known):
        taught.append((scores, kept.copy(), known))
        return None if kept.all() else np.cos(np.arange(40))

    def fence(_rule, scores, _known, further):
        told.append((scores, further))
        return np.sort(scores)[-5]

    monkeypatch.setattr(fitting, "resemblance", resembling)
    monkeypatch.setattr(fitting, "likeness", lambda _features, scores, _known: (np.sin(np.arange(40)), 1.0))
    monkeypatch.setattr(PosteriorFence, "fence", fence)
    _, refinement = fitted(store, {39: True}, rule="auto", rounds=2)
    (_, (combined,)), (scores, further) = told
    np.testing.assert_array_equal(np.argsort(taught[0][0]), np.argsort(combined))
    assert [(~kept).sum() for _, kept, _ in taught][:2] == [0, 4]
    assert all(known == {39: True} for *_, known in taught)
    assert len(further) == 2
    for scale in further:  # all have the order of the third
        np.testing.assert_array_equal(np.argsort(scale), np.argsort(scores))
    parts = {name: np.array(values) for name, values in refinement.parts.items()}
    np.testing.assert_array_equal(parts["resemblance"], np.cos(np.arange(40)))
    # Half as much of the resemblance as of the distance, both in their spreads.
    standard = [
        parts[name] / lower_side_scale(parts[name][refinement.kept])[1] for name in ("neighbours", "resemblance")
    ]
    weights = np.linalg.lstsq(np.column_stack([*standard, np.ones(40)]), parts["resembling"], rcond=None)[0]
    assert weights[1] / weights[0] == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_array_equal(np.argsort(parts["resembling"]), np.argsort(refinement.scores))
    monkeypatch.setattr(fitting, "likeness", lambda _features, scores, _known: (np.sin(np.arange(40)), 0.99))
    assert "resembling" not in fitted(store, rule="auto", rounds=2)[1].parts


def test_parts_that_lie_anywhere_are_learned_whole():
    generator = torch.Generator().manual_seed(1)
    embeddings = 0.3 * torch.randn(40, 20, 8, generator=generator)
    for i, image in enumerate(embeddings):  # the part: three patches at a place of its own in every image
        image[[i % 20, (i + 1) % 20, (i + 2) % 20]] += 4 * torch.randn(3, 8, generator=generator)
    store = FeatureStore()
    store.add([f"{i:02d}.png" for i in range(40)], embeddings)
    fitter, refinement = fitted(store, rule="share:0", tail=0.1)
    assert all(refinement.kept)
    assert fitter.learned.all()


def test_what_is_left_out_leaves_no_trace(store):
    first, _ = fitted(store, rule="share:0", adaptation_steps=20)
    embeddings = store.images()
    embeddings[~first.learned[torch.from_numpy(first.order).argsort()]] = 99.0
    other = FeatureStore()
    other.add(store.paths, embeddings)
    initial = first.meta_train()
    densities = []
    for images in (store, other):
        generator = torch.Generator().manual_seed(0)
        fitter = DensityFitter(
            images, first.flow, GRID, first.settings, generator, Progress(disable=True), whitening=first.whitening
        )
        fitter.learned = first.learned
        densities.append(fitter.fit_kept(first.kept, initial))
    torch.testing.assert_close(densities[0].gaussian.precision_root, densities[1].gaussian.precision_root)
    torch.testing.assert_close(densities[0].parameters, densities[1].parameters)


def test_patches_left_out_are_scored_as_outsiders(store):
    fitter, _ = fitted(store, rule="share:0", meta_steps=0, adaptation_steps=0)
    gaussian = fitter.density.gaussian
    for rows, chunk in fitter.whitened(fitter.kept.nonzero()[0]):
        as_they_are = bits_per_dimension(gaussian(chunk), gaussian.log_det)
        out = ~fitter.learned[rows]
        torch.testing.assert_close(fitter.maps[rows][out], as_they_are[out])
        assert (fitter.maps[rows][~out] != as_they_are[~out]).all()  # as if left out, though they were learned from


def test_the_loss_learns_from_the_likely_patches():
    flow = new_flow(8, FitSettings(**SETTINGS), 0)
    patches, positions = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 16)
    likely = flow.bits(patches, positions).sort().values[:32].mean()
    torch.testing.assert_close(flow_loss(flow, 0.2)(trainable(flow), PatchBatch(patches, positions)), likely)


def test_the_same_seed_gives_the_same_flow_and_leaves_other_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again = (new_flow(8, FitSettings(**SETTINGS), 5) for _ in range(2))
    assert torch.rand(1) == expected
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert first.dimensions == 6
