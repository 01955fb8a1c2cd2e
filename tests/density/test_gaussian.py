import pytest
import torch

from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.features.embedding import Whitening


def images(count=40, places=6, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(channels) + 0.3 * torch.randn(places, channels, channels, generator=generator)
    x = torch.randn(count, places, 1, channels, generator=generator)
    return (x @ mix).squeeze(2) + torch.randn(places, channels, generator=generator)


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


def masked(count, seed=1):
    """A mask with other patches at every place, at least a third of them."""
    mask = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed)) < torch.linspace(0.5, 0.95, 6)
    mask[: count // 3] = True
    return mask


def fitted_alone(x, mask, place, shrinkage, pooled):
    """Mean and covariance of the masked patches of one place, by the definitions."""
    here = x[mask[:, place], place]
    own = torch.cov(here.T)
    return here.mean(0), (1 - shrinkage) * own + shrinkage * pooled + 1e-3 * torch.eye(x.shape[-1])


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [7, 60])
def test_a_mask_fits_every_place_on_its_masked_patches_alone(shrinkage, chunk):
    x, mask = images(60), masked(60)
    gaussian = PositionalGaussian.fit(x.split(chunk), shrinkage, mask)
    pooled = torch.cov(x[mask].T, correction=0)
    assert torch.equal(gaussian.count, mask.sum(0).to(gaussian.count.dtype))
    for place in range(6):
        mean, covariance = fitted_alone(x, mask, place, shrinkage, pooled)
        torch.testing.assert_close(gaussian.mean[place], mean, atol=1e-4, rtol=1e-4)
        root = gaussian.precision_root[place]
        torch.testing.assert_close(root @ covariance @ root.T, torch.eye(5), atol=2e-3, rtol=0)
        torch.testing.assert_close(gaussian.log_det[place], -0.5 * torch.logdet(covariance), atol=2e-3, rtol=0)


def test_a_mask_of_whole_images_is_fitting_on_them_and_a_full_one_on_all():
    x = images(40)
    rows = torch.arange(40) % 3 > 0
    full = torch.ones(40, 6, dtype=torch.bool)
    for mask, same in [(rows.unsqueeze(1).expand(40, 6), x[rows]), (full, x)]:
        found, expected = PositionalGaussian.fit([x], 0.2, mask), PositionalGaussian.fit([same], 0.2)
        for one, two in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(one, two, check_dtype=False, atol=1e-5, rtol=1e-4)


def test_what_is_masked_out_leaves_no_trace():
    x, mask = images(40), masked(40)
    other = torch.where(mask.unsqueeze(2), x, torch.full_like(x, 1e4))
    for one, two in zip(*(PositionalGaussian.fit([v], 0.2, mask)[:4] for v in (x, other)), strict=True):
        assert torch.equal(one, two)


def test_a_place_with_one_patch_takes_the_pooled_spread():
    x, mask = images(40), torch.ones(40, 6, dtype=torch.bool)
    mask[1:, 2] = False
    gaussian = PositionalGaussian.fit([x], 0.1, mask)
    covariance = torch.cov(x[mask].T, correction=0) + 1e-3 * torch.eye(5)
    root = gaussian.precision_root[2]
    torch.testing.assert_close(root @ covariance @ root.T, torch.eye(5), atol=2e-3, rtol=0)
    assert torch.equal(gaussian.mean[2], x[0, 2])
    z, log_det = gaussian.leave_one_out(gaussian(x))
    assert z.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("shrinkage", [0.05, 0.3])
def test_leave_one_out_with_a_mask_matches_leaving_one_out(shrinkage):
    x, mask = images(60), masked(60)
    gaussian = PositionalGaussian.fit([x], shrinkage, mask)
    z, log_det = gaussian.leave_one_out(gaussian(x))
    truth = torch.empty(60, 6)
    for i in range(60):
        others = mask.clone()
        others[i] = False
        rest = PositionalGaussian.fit([x], shrinkage, others)
        truth[i] = (rest(x[i : i + 1]).square().sum(-1) / 2 - rest.log_det)[0]
    corrected = z.square().sum(-1) / 2 - log_det
    plain = gaussian(x).square().sum(-1) / 2 - gaussian.log_det
    errors = (corrected - truth)[mask].abs().mean() / (plain - truth)[mask].abs().mean()
    assert errors < 0.1
