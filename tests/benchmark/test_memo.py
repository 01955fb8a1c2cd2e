import copy
import math

import pytest
import torch
from anomalib.models import Cflow, Fastflow, Padim, Stfpm
from anomalib.models.components import TimmFeatureExtractor

from anomalib_metarefine.benchmark.memo import Memo, MemoisedFeatures, frozen_networks
from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, use_offline_weights

BOTH = ["blocks.2", "blocks.4"]


class Counted:
    """Images that a network embeds."""

    def __init__(self, network):
        self.images = 0
        self.forward = network.forward
        network.forward = self

    def __call__(self, images):
        self.images += len(images)
        return self.forward(images)


@pytest.fixture(autouse=True)
def _weights():
    use_offline_weights()


def extractor(layers=BOTH, pre_trained=True):
    return TimmFeatureExtractor(OFFLINE_BACKBONE, layers, pre_trained).eval()


def test_the_memo_is_bounded():
    memo = Memo(limit_mb=1)
    for key in range(10):
        memo.fetch(key, ["x"], lambda: [torch.zeros(2**16)])  # a quarter of a megabyte each
    assert len(memo) == 4
    assert memo.nbytes == 2**20
    assert memo.fetch(9, ["x"], lambda: [torch.ones(1)]) == [1]  # asked for again, because it was not kept


def test_what_features_cost(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 27.0])
    monkeypatch.setattr("anomalib_metarefine.benchmark.memo.time.perf_counter", lambda: next(clock))
    memo = Memo()

    def ask(*key):
        memo.fetch(key, ["x"], lambda: [torch.zeros(1)])

    ask("features", "a")
    ask("features", "b")
    ask("image", "c")
    assert (memo.seconds, memo.feature_seconds) == (11, 4)
    memo.restart()
    assert math.isnan(memo.feature_seconds)
    ask("features", "b")
    ask("features", "b")
    assert (memo.seconds, memo.feature_seconds) == (11, 3)  # though it was not computed now


def test_a_copied_dataset_shares_the_memo():
    memo = Memo()
    assert copy.deepcopy([memo])[0] is memo


@pytest.mark.parametrize("warm", [(), (0, 2)])
def test_features_are_those_of_the_network(warm):
    images = torch.rand(3, 3, 64, 96)
    plain = extractor()
    expected = [plain(image.unsqueeze(0)) for image in images]
    shared = extractor()
    shared.feature_extractor.forward = MemoisedFeatures(shared.feature_extractor, Memo())
    if warm:
        shared(images[list(warm)])
    found = shared(images)
    for layer in BOTH:  # to the last bit, whatever batch an image was in
        assert torch.equal(found[layer], torch.cat([one[layer] for one in expected]))


def test_every_image_is_embedded_once():
    images, memo = torch.rand(3, 3, 64, 64), Memo()
    first, second, one_layer, ours = extractor(), extractor(), extractor(BOTH[1:]), Backbone(OFFLINE_BACKBONE, BOTH)
    networks = [first.feature_extractor, second.feature_extractor, one_layer.feature_extractor, ours.net]
    counts = [Counted(network) for network in networks]
    for network in networks:
        network.forward = MemoisedFeatures(network, memo)
    maps = first(images)
    again, last, our_maps = second(images), one_layer(images), ours(images)
    assert [count.images for count in counts] == [3, 0, 0, 0]
    assert torch.equal(last["blocks.4"], maps["blocks.4"])
    assert torch.equal(our_maps[0], maps["blocks.2"])
    again["blocks.2"].zero_()  # models write into what they get
    assert torch.equal(second(images)["blocks.2"], maps["blocks.2"])


def test_other_weights_and_other_pixels_are_other_features():
    images, memo = torch.rand(1, 3, 64, 64), Memo()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random = extractor(pre_trained=False)
        random.feature_extractor.forward = MemoisedFeatures(random.feature_extractor, memo)
        found.append(random(images)["blocks.2"])
    assert not torch.equal(*found)
    other = images.clone()
    other[0, 0, 0, 0] += 1e-3
    assert not torch.equal(random(other)["blocks.2"], found[1])
    assert len(memo) == 3 * 2


def test_what_is_frozen():
    lite = {"backbone": OFFLINE_BACKBONE, "layers": BOTH}
    padim = Padim(**lite, n_features=10).model
    assert list(frozen_networks(padim)) == [padim.feature_extractor.feature_extractor]
    cflow = Cflow(**lite).model  # freezes the parameters, too
    assert list(frozen_networks(cflow)) == [cflow.encoder.feature_extractor]
    backbone = Backbone(OFFLINE_BACKBONE)
    assert list(frozen_networks(backbone)) == [backbone.net]
    assert list(frozen_networks(TimmFeatureExtractor(OFFLINE_BACKBONE, BOTH, requires_grad=True))) == []
    students = Stfpm(**lite).model
    assert list(frozen_networks(students)) == [students.teacher_model.feature_extractor]
    assert list(frozen_networks(Fastflow("resnet18", pre_trained=False).model)) != []


def test_what_one_process_writes_another_reads(tmp_path):
    def compute(value):
        return lambda: [torch.full((1000,), value), torch.tensor([value, value])]

    writing = Memo(limit_mb=0.01, folder=tmp_path, writes=True)
    for i in range(5):  # 4 KB each: more than fits
        writing.fetch(("features", i), ["a", "b"], compute(float(i)))
    assert len(list(tmp_path.iterdir())) == 2
    writing.write()

    reading = Memo(limit_mb=0.01, folder=tmp_path)
    reading.restart()
    for i in range(5):
        a, b = reading.fetch(("features", i), ["a", "b"], lambda: 1 / 0)
        assert a.eq(i).all()
        assert b.tolist() == [i, i]
    assert reading.seconds == 0
    assert reading.feature_seconds == pytest.approx(writing.seconds)
    assert reading.nbytes == 5 * 4008
    files = sorted(tmp_path.iterdir())
    for i in range(5, 10):
        reading.fetch(("features", i), ["a", "b"], compute(float(i)))
    assert reading.nbytes - 5 * 4008 <= 0.01 * 2**20  # the limit is for what is no file's
    assert sorted(tmp_path.iterdir()) == files
