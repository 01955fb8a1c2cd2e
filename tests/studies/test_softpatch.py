import numpy as np
import pytest
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from jsonargparse import ArgumentParser
from lightning import seed_everything
from sklearn.neighbors import LocalOutlierFactor

from studies.baselines.softpatch import SoftPatch, SoftPatchModel, local_outlier_factors


def fitted(noise_share, ratio=0.5, images=12, dirty=2, neighbors=1):
    """A model whose memory is made of random patches on a 3 x 4 grid; the last images are far away at one position."""
    torch.manual_seed(0)
    model = SoftPatchModel(["blocks.2"], "tf_efficientnet_lite0", False, neighbors, 5, noise_share)
    maps = torch.randn(images, 40, 3, 4) * 0.1 + torch.arange(12).view(3, 4) * 5
    maps[images - dirty :, :, 1, 2] += 8 * torch.randn(dirty, 40)
    model.train()
    for part in maps.split(5):
        model.embedding_store.append(model.reshape_embedding(model.generate_embedding({"blocks.2": part})))
    seed_everything(0, verbose=False)
    model.subsample_embedding(ratio)
    return model.eval(), maps


def test_the_outliers_of_a_position_leave_the_memory():
    model, maps = fitted(noise_share=2 / 144)
    dirty = maps[-2:, :, 1, 2]
    assert torch.cdist(dirty, model.memory_bank).min() > 1
    assert len(model.memory_bank) == int(0.5 * 142)
    everything, maps = fitted(noise_share=0.0)
    assert torch.cdist(maps[-2:, :, 1, 2], everything.memory_bank).min() < 1e-3
    assert len(everything.memory_bank) == 72


def test_the_share_that_is_dropped():
    model, _ = fitted(noise_share=0.25, ratio=1.0)
    assert len(model.memory_bank) == 0.75 * 144
    assert len(model.memory_weights) == len(model.memory_bank)


def test_distances_are_weighted_by_what_they_are_nearest_to():
    model, maps = fitted(noise_share=0.0, ratio=1.0)
    patches = maps[:, :, 1, 2] + 0.01
    distances, places = PatchcoreModel.nearest_neighbors(model, patches, 1)
    weighted, same = model.nearest_neighbors(patches, 1)
    assert torch.equal(places, same)
    torch.testing.assert_close(weighted, distances * model.memory_weights[places])
    assert model.memory_weights[places[-1]] > 2 * model.memory_weights[places[0]]  # the dirty one is not trusted


def test_positions_are_kept_apart():
    """Patches at all positions but one are alike; a patch that looks like those of another position is an outlier."""
    model, _ = fitted(noise_share=0.0, ratio=1.0, dirty=0)
    assert model.memory_weights.max() < 2
    maps = torch.randn(12, 40, 3, 4) * 0.1 + torch.arange(12).view(3, 4) * 5
    maps[3, :, 0, 0] = maps[4, :, 2, 3] + 0.01
    swapped = SoftPatchModel(["blocks.2"], "tf_efficientnet_lite0", False, 1, 5, 1 / 144)
    swapped.embedding_store.append(swapped.reshape_embedding(swapped.generate_embedding({"blocks.2": maps})))
    swapped.subsample_embedding(1.0)
    assert len(swapped.memory_bank) == 143
    assert (swapped.memory_bank == maps[4, :, 2, 3]).all(1).any()
    assert not (swapped.memory_bank == maps[3, :, 0, 0]).all(1).any()  # the one among patches that it is not like


def test_outlier_factors_of_few_and_equal_points():
    assert local_outlier_factors(np.ones((1, 4)), 6).tolist() == [1]
    assert local_outlier_factors(np.ones((9, 4)), 6) == pytest.approx(1)
    assert len(local_outlier_factors(np.random.default_rng(0).normal(size=(4, 3)), 6)) == 4
    points = np.random.default_rng(0).normal(size=(50, 3))
    assert np.array_equal(
        local_outlier_factors(points, 6), -LocalOutlierFactor(n_neighbors=6).fit(points).negative_outlier_factor_
    )


@pytest.mark.parametrize("arguments", [{"noise_share": 1.0}, {"noise_share": -0.1}, {"lof_neighbors": 0}])
def test_settings_out_of_range(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        SoftPatch(pre_trained=False, **arguments)


def test_its_command_line():
    """anomalib makes one of the types of the constructor."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(SoftPatch, "model")
    found = parser.parse_args(["--model", "SoftPatch", "--model.noise_share", "0.3"])
    assert found.model.init_args.noise_share == 0.3
