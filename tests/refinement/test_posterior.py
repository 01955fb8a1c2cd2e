import numpy as np
import pytest
from scipy.stats import exponnorm

from anomalib_metarefine.refinement import posterior as contamination
from anomalib_metarefine.refinement.posterior import estimate_contamination, further_scales
from anomalib_metarefine.refinement.rules import PosteriorFence


def mixture(dirty: int, clean: int = 300, shift: float = 7.0, seed: int = 0) -> np.ndarray:
    """Clean scores first; dirty ones ``shift`` standard deviations up."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 1, clean), rng.normal(shift, 1, dirty)])


@pytest.mark.parametrize("dirty", [15, 60, 200])
def test_finds_the_share_of_what_stands_apart(dirty):
    scores = mixture(dirty)
    found = estimate_contamination(scores)
    low, high = found.interval()
    share = dirty / len(scores)
    assert low <= share <= high
    # How many hide among the clean ones nobody can tell, but that these are dirty is plain.
    assert low == pytest.approx(share, abs=0.05)
    assert (found.dirty_probability[-dirty:] > 0.8).mean() > 0.9
    assert (found.dirty_probability[:300] > 0.5).mean() < 0.03


def test_a_clean_set_may_be_clean():
    for seed in range(3):
        found = estimate_contamination(mixture(0, seed=seed))
        low, _ = found.interval()
        assert low < 0.005
        assert found.estimate < 0.1
        assert (found.dirty_probability < 0.5).all()


def test_overlap_widens_the_interval_and_raises_the_doubt():
    apart, mixed = estimate_contamination(mixture(75, shift=9)), estimate_contamination(mixture(75, shift=2))
    assert mixed.doubt > 3 * apart.doubt
    assert mixed.interval()[0] < apart.interval()[0]


def test_order_shift_and_scale_do_not_matter():
    scores = np.round(mixture(30) * 64)
    found = estimate_contamination(scores)
    order = np.random.default_rng(1).permutation(len(scores))
    shuffled = estimate_contamination(scores[order])
    np.testing.assert_array_equal(shuffled.shares, found.shares)
    np.testing.assert_array_equal(shuffled.dirty_probability, found.dirty_probability[order])
    np.testing.assert_array_equal(estimate_contamination(4 * scores + 1024).shares, found.shares)


def test_a_higher_score_is_never_less_suspicious():
    scores = np.append(mixture(30), [1e3, 1e9])
    probability = estimate_contamination(scores).dirty_probability
    assert (np.diff(probability[np.argsort(scores)]) >= 0).all()


@pytest.mark.parametrize("scores", [np.zeros(50), np.arange(9.0), np.array([3.0])])
def test_too_little_to_tell(scores):
    found = estimate_contamination(scores)
    assert found.interval() == pytest.approx((0, 0.5), abs=0.03)
    assert (found.dirty_probability <= 0.25).all()
    assert PosteriorFence().fence(scores) == np.inf


def test_many_scores_are_thinned_and_all_get_a_probability():
    scores = mixture(1_000, clean=9_000)
    found = estimate_contamination(scores)
    assert found.interval()[0] == pytest.approx(0.1, abs=0.03)
    assert (found.dirty_probability[-1_000:] > 0.5).mean() > 0.95


def test_an_interval_grows_with_its_level():
    found = estimate_contamination(mixture(30))
    widths = [np.diff(found.interval(level))[0] for level in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_density_is_that_of_scipy():
    x = np.linspace(-5, 30, 50)
    ours = contamination._log_exponnorm(x, 0.5, 1.5, 3.0)
    np.testing.assert_allclose(ours, exponnorm(K=2.0, loc=0.5, scale=1.5).logpdf(x), rtol=1e-9)


@pytest.mark.parametrize("level", [0.05, 0.15])
def test_the_fence_keeps_to_its_level(level):
    """Clean images among those rejected: at most about the level, where the scores are as the model has them."""
    wrong = rejected = 0
    for seed in range(4):
        scores = mixture(60, shift=3.5, seed=seed)
        outside = scores > PosteriorFence(level).fence(scores)
        wrong, rejected = wrong + outside[:300].sum(), rejected + outside.sum()
    assert rejected > 100
    assert wrong / rejected < 1.5 * level


@pytest.mark.usefixtures("short_chains")
class TestAnswers:
    """What a person said about some of the images."""

    @staticmethod
    def overlapping(dirty: int = 120, count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Scores without a visible split, in random order, and which are dirty."""
        rng = np.random.default_rng(seed)
        truth = np.arange(count) < dirty
        rng.shuffle(truth)
        return rng.exponential(1, count) + rng.normal(0, 0.5, count) + 1.5 * truth, truth

    @staticmethod
    def asked(truth: np.ndarray, places: np.ndarray) -> dict[int, bool]:
        return {int(place): not truth[place] for place in places}

    def test_tell_how_dirty_a_set_is_where_scores_do_not(self):
        covered = []
        for seed in range(3):
            scores, truth = self.overlapping(seed=seed)
            alone = estimate_contamination(scores)
            told = estimate_contamination(scores, known=self.asked(truth, np.argsort(scores)[::-1][:30]))
            assert alone.estimate < 0.1
            assert told.estimate > 0.2
            covered.append(told.interval()[0] <= 0.4 <= told.interval()[1])
        assert sum(covered) >= 2

    def test_that_all_is_clean_rule_out_a_dirty_set(self):
        scores = mixture(15)  # some that stand apart
        told = estimate_contamination(scores, known=dict.fromkeys(np.argsort(scores)[::-1][:30].tolist(), True))
        assert told.interval()[1] < 0.05
        assert estimate_contamination(scores).interval()[1] > 0.1

    def test_tell_how_many_hide_among_the_usual(self):
        scores = mixture(30)
        truth = np.arange(330) >= 300
        usual = np.random.default_rng(0).permutation(300)[:60]
        none_hide = estimate_contamination(scores, known=self.asked(truth, usual)).interval()
        truth[usual[:20]] = True
        some_hide = estimate_contamination(scores, known=self.asked(truth, usual)).interval()
        assert none_hide[1] < 0.2 < some_hide[0]

    def test_on_all_images_leave_nothing_to_estimate(self):
        scores, truth = self.overlapping(dirty=45)
        told = estimate_contamination(scores, known=self.asked(truth, np.arange(300)))
        np.testing.assert_allclose(told.shares, 0.15)
        np.testing.assert_array_equal(told.dirty_probability, truth)

    def test_hold_even_against_the_score_and_one_slip_changes_little(self):
        scores = mixture(30)
        lowest, highest = int(scores.argmin()), int(scores.argmax())
        told = estimate_contamination(scores, known={lowest: False, highest: True})
        assert told.dirty_probability[[lowest, highest]].tolist() == [1, 0]
        assert (told.dirty_probability[300:] > 0.8).mean() > 0.9
        assert (told.dirty_probability[:300] > 0.5).mean() < 0.03

    def test_are_forgiven_a_slip(self):
        scores = mixture(30)
        lowest = np.argsort(scores)[:10].tolist()
        slip = estimate_contamination(scores, known=dict.fromkeys(lowest, True) | {lowest[0]: False})
        assert slip.estimate < 0.18  # taken at its word, one of ten would make it 0.2

    def test_bound_the_share_and_order_does_not_matter(self):
        scores, truth = self.overlapping()
        known = self.asked(truth, np.arange(100))
        found = estimate_contamination(scores, known=known)
        assert found.shares.min() >= truth[:100].sum() / 300
        assert found.shares.max() <= 1 - (~truth[:100]).sum() / 300
        assert found.summary()["answers"] == 100
        turned = estimate_contamination(scores, known=dict(reversed(known.items())))
        np.testing.assert_array_equal(turned.shares, found.shares)

    def test_count_where_there_is_too_little_to_tell(self):
        told = estimate_contamination(np.arange(8.0), known={0: True, 1: True, 6: False, 7: False})
        assert told.interval() == pytest.approx((0.25, 0.5), abs=0.02)
        assert told.dirty_probability[[0, 1, 6, 7]].tolist() == [0, 0, 1, 1]

    def test_bring_the_fence_down_for_the_others(self):
        scores, truth = self.overlapping()
        places = np.argsort(scores)[::-1][:60:2]
        known = dict.fromkeys(places.tolist(), False)  # all dirty
        told, alone = PosteriorFence().fence(scores, known), PosteriorFence().fence(scores)
        others = np.setdiff1d(np.flatnonzero(scores > told), places)
        assert told < alone
        assert len(others) > 10
        assert truth[others].mean() > 0.7
        # What the rule promises holds for the others alone: the answers buy no credit.
        probability = estimate_contamination(scores, known=known).dirty_probability[others]
        assert (1 - probability).mean() <= 0.15
        assert probability.min() > 0.5

    def test_on_one_image_do_not_reject_those_above_it(self):
        scores = mixture(60, shift=9)
        fifth, *next_ones = np.argsort(scores)[::-1][64:84].tolist()  # of the clean ones
        known = {fifth: False, **dict.fromkeys(next_ones, True)}
        assert 55 <= (scores > PosteriorFence().fence(scores, known)).sum() <= 60

    def test_of_fewer_than_twenty_images_leave_the_fence(self):
        scores, _ = self.overlapping()
        known = dict.fromkeys(np.argsort(scores)[::-1][:19].tolist(), False)
        assert PosteriorFence().fence(scores, known) == PosteriorFence().fence(scores)

    def test_never_raise_the_fence_unless_they_prove_it_wrong(self):
        scores = mixture(30)
        alone = PosteriorFence().fence(scores)
        assert alone < 6
        lowest = np.argsort(scores)[:20].tolist()
        assert PosteriorFence().fence(scores, dict.fromkeys(lowest, False)) <= alone
        past = np.flatnonzero(scores > alone)
        elsewhere = dict.fromkeys(lowest, True)
        few = elsewhere | dict.fromkeys(past[:3].tolist(), True)  # of 30: about what the rule promises
        assert PosteriorFence().fence(scores, few) <= alone
        assert PosteriorFence().fence(scores, elsewhere | dict.fromkeys(past.tolist(), True)) == np.inf

    @pytest.mark.parametrize(
        ("clean", "dirty", "fence"),
        [(0, 20, 2.0), (3, 17, 2.0), (4, 16, 9.0), (4, 15, 2.0)],
        ids=["all dirty", "as many clean as promised", "more", "more, of too few answers"],
    )
    def test_prove_a_fence_wrong_by_too_many_clean_ones_past_it(self, monkeypatch, clean, dirty, fence):
        monkeypatch.setattr(PosteriorFence, "_fence", lambda _rule, _scales, known: 9.0 if known else 2.0)
        scores = np.r_[np.zeros(80), np.full(20, 5.0)]  # three of 20 are the 15 % that the rule allows itself
        known = dict.fromkeys(range(80, 80 + clean), True) | dict.fromkeys(range(80 + clean, 80 + clean + dirty), False)
        assert PosteriorFence().fence(scores, known) == fence
        below = dict.fromkeys(range(20), True)  # clean ones, but not past it
        assert PosteriorFence().fence(scores, below) == 2


@pytest.mark.usefixtures("short_chains")
class TestFurtherScales:
    """The same images on a second scale, and on a third."""

    CLEAN, DIRTY = mixture(0), mixture(60, clean=240)  # in the second, the last 60 images

    def test_share_the_draws_and_the_higher_probability_counts(self):
        scores = np.sort(self.CLEAN)
        combined = np.sort(self.DIRTY)
        one, other = estimate_contamination(scores), estimate_contamination(combined)
        both = estimate_contamination(scores, further=[combined])
        assert sorted(both.shares) == sorted([*one.shares, *other.shares])
        np.testing.assert_array_equal(
            both.dirty_probability, np.maximum(one.dirty_probability, other.dirty_probability)
        )
        assert one.estimate < 0.1 < other.interval()[0]  # they disagree, so
        assert both.interval()[0] <= one.estimate < other.estimate <= both.interval()[1]

    def test_count_alike(self):
        scales = np.sort(self.CLEAN), np.sort(mixture(30, clean=270)), np.sort(self.DIRTY)
        alone = [estimate_contamination(scale) for scale in scales]
        together = estimate_contamination(scales[0], further=scales[1:])
        assert sorted(together.shares) == sorted(np.concatenate([one.shares for one in alone]))
        np.testing.assert_array_equal(together.dirty_probability, np.max([one.dirty_probability for one in alone], 0))
        past = scales[0] > PosteriorFence().fence(scales[0], further=scales[1:])
        assert past.sum() == max((scale > PosteriorFence().fence(scale)).sum() for scale in scales)

    def test_are_found_among_the_parts_of_a_score(self):
        parts = {"neighbours": [0.0], "resembling": [2.0], "likeness": [3.0], "combined": [1.0]}
        assert [scale.tolist() for scale in further_scales(parts)] == [[1], [2]]
        assert further_scales({"neighbours": [0.0]}) == []

    def test_know_what_a_person_said(self):
        known = {0: False, 299: True}
        both = estimate_contamination(np.sort(self.CLEAN), 0, known, [np.sort(self.DIRTY)])
        assert both.answers == 2
        assert both.dirty_probability[[0, 299]].tolist() == [1, 0]

    @pytest.mark.parametrize("swapped", [False, True], ids=["on the second", "on the first"])
    def test_reject_what_stands_apart_on_either(self, swapped):
        scales = (np.sort(self.CLEAN), np.sort(self.DIRTY))
        scores, combined = reversed(scales) if swapped else scales
        alone = max(int((scale > PosteriorFence().fence(scale)).sum()) for scale in scales)
        assert alone == pytest.approx(60, abs=5)
        past = scores > PosteriorFence().fence(scores, further=[combined])
        assert past.sum() == alone
        assert past[-alone:].all()

    def test_learn_from_answers_on_the_second_too(self):
        scores, _ = TestAnswers.overlapping()
        by_score = np.argsort(scores)
        known = dict.fromkeys(by_score[::-1][:60:2].tolist(), False)
        nothing_apart = np.empty(300)
        nothing_apart[by_score] = np.sort(self.CLEAN)
        rule = PosteriorFence()
        expected = (scores > rule.fence(scores, known)).sum()
        assert expected > (nothing_apart > rule.fence(nothing_apart, known)).sum()
        past = nothing_apart > rule.fence(nothing_apart, known, [scores])
        assert past.sum() == expected
