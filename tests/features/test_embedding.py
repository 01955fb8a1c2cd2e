import pytest
import torch

from anomalib_metarefine.features.embedding import PositionalGaussian, Whitening, patch_embeddings


def images(count=40, places=6, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(channels) + 0.3 * torch.randn(places, channels, channels, generator=generator)
    x = torch.randn(count, places, 1, channels, generator=generator)
    return (x @ mix).squeeze(2) + torch.randn(places, channels, generator=generator)


def test_global_whitening_gives_unit_covariance():
    x = images(2000).reshape(-1, 5)
    z = Whitening.fit(x, 5)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(5), atol=0.05, rtol=0)


def test_positional_whitening_gives_unit_covariance_at_every_place():
    x = images(4000)
    z = PositionalGaussian.fit([x], shrinkage=0.0)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(6, 5), atol=1e-3, rtol=0)
    for place in range(6):
        torch.testing.assert_close(torch.cov(z[:, place].T), torch.eye(5), atol=0.1, rtol=0)


def test_chunks_do_not_matter():
    x = images()
    whole, parts = (PositionalGaussian.fit(chunks, 0.2) for chunks in ([x], x.split(7)))
    torch.testing.assert_close(whole.precision_root, parts.precision_root, atol=1e-4, rtol=1e-3)


def test_log_det_is_that_of_the_map():
    gaussian = PositionalGaussian.fit([images()], 0.2)
    torch.testing.assert_close(gaussian.log_det, torch.linalg.slogdet(gaussian.precision_root)[1])


@pytest.mark.parametrize("shrinkage", [0.05, 0.3])
def test_leave_one_out_matches_leaving_one_out(shrinkage):
    x = images(60)
    gaussian = PositionalGaussian.fit([x], shrinkage)
    z, log_det = gaussian.leave_one_out(gaussian(x))
    corrected, plain, truth = [], [], []
    for i in range(len(x)):
        rest = PositionalGaussian.fit([torch.cat([x[:i], x[i + 1 :]])], shrinkage)
        truth.append(rest(x[i : i + 1]).square().sum(-1) / 2 - rest.log_det)
        corrected.append(z[i : i + 1].square().sum(-1) / 2 - log_det[i])
        plain.append(gaussian(x[i : i + 1]).square().sum(-1) / 2 - gaussian.log_det)
    truth, corrected, plain = torch.cat(truth), torch.cat(corrected), torch.cat(plain)
    # The pooled covariance keeps the image: a small error is expected.
    assert (corrected - truth).abs().mean() < 0.1 * (plain - truth).abs().mean()


def test_one_image_and_flat_images_have_a_density():
    single = PositionalGaussian.fit([images(1)], 0.1)
    assert single(images(1)).isfinite().all()
    flat = torch.zeros(5, 6, 3)
    z = Whitening.fit(flat.reshape(-1, 3), 3)(flat)
    assert PositionalGaussian.fit([z], 0.1)(z + 1).isfinite().all()


@pytest.mark.parametrize("shapes", [[(8, 20), (4, 10)], [(9, 21), (4, 10)], [(4, 10), (8, 20)], [(4, 10)]])
def test_maps_of_any_shape_meet_on_one_grid(shapes):
    maps = [torch.ones(2, 3, *shape) for shape in shapes]
    rows, columns = shapes[-1]
    embeddings = patch_embeddings(maps)
    assert embeddings.shape == (2, rows * columns, 3 * len(shapes))
    torch.testing.assert_close(embeddings, torch.ones_like(embeddings))
