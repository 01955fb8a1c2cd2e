"""MetaRefine under anomalib's own Engine: what upstream's integration test asks for, and bad input."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from anomalib_metarefine import Contaminated, MetaRefine
from anomalib_metarefine.deploy.sidecar import read_sidecar
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.initialisation import SharedInitialisation, learn_shared
from anomalib_metarefine.model.torch_model import MetaRefineModel
from anomalib_metarefine.settings import Settings
from tests.conftest import folder, part, plate

pytestmark = pytest.mark.usefixtures("patches_of_few_images")

SMALL = {"image_size": (96, 96), "dimensions": 32, "meta_steps": 2, "adaptation_steps": 2, "visualizer": False}


def engine(root, **settings) -> Engine:
    return Engine(default_root_dir=root / "results", **{"logger": False, "accelerator": "cpu", **settings})


def trained(datamodule, root, **settings) -> tuple[MetaRefine, Engine]:
    seed_everything(0, verbose=False)
    model, runner = MetaRefine(**{**SMALL, **settings}), engine(root)
    runner.fit(model, datamodule=datamodule)
    return model, runner


def test_trains_tests_validates_predicts_and_saves(datamodule, tmp_path):
    dirty = Contaminated(datamodule, 0.125)
    model, runner = trained(dirty, tmp_path)
    assert {p.split("/")[-2] for p in model.refinement.rejected} >= {"blob"}
    (metrics,) = runner.test(model, datamodule=dirty)
    assert metrics["image_AUROC"] == 1
    (metrics,) = runner.validate(model, datamodule=dirty)
    assert metrics["image_AUROC"] == 1
    predictions = runner.predict(model, dataset=PredictDataset(tmp_path / "test"))
    assert sum(len(batch.image_path) for batch in predictions) == 16
    assert predictions[0].anomaly_map.shape[-2:] == (96, 96)

    loaded = MetaRefine.load_from_checkpoint(runner.trainer.checkpoint_callback.best_model_path).eval()
    assert loaded.refinement == model.refinement
    image = torch.rand(1, 3, 120, 80)
    torch.testing.assert_close(loaded(image).pred_score, model.eval()(image).pred_score)


def test_size_that_the_patches_do_not_divide_is_one_in_checkpoint_and_graph(tmp_path):
    settings = {**SMALL, "backbone": "vit_tiny_patch16_224", "pre_trained": False, "image_size": (100, 90)}
    model = MetaRefine(**settings)
    sizes = {
        part.size if isinstance(part.size, tuple) else tuple(part.size)
        for part in (model.pre_processor.transform.transforms[0], model.pre_processor.export_transform[0])
    }
    assert sizes == {(112, 96)}
    assert MetaRefine(**{**settings, "image_size": None}).pre_processor.export_transform[0].size == (256, 256)


def test_several_processes_are_refused():
    model = MetaRefine(**SMALL)
    model.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="found 2 processes.*Set devices=1 and num_nodes=1"):
        model.setup("fit")
    model.setup("test")


def test_a_finished_checkpoint_is_not_curated_again(datamodule, tmp_path):
    model, runner = trained(datamodule, tmp_path)
    checkpoint = runner.trainer.checkpoint_callback.best_model_path
    again = MetaRefine(**SMALL)
    again.fit = lambda: pytest.fail("fitted a second time")
    engine(tmp_path).fit(again, datamodule=datamodule, ckpt_path=checkpoint)
    assert again.refinement == model.refinement
    engine(tmp_path).train(again, datamodule=datamodule, ckpt_path=checkpoint)


def test_same_seed_same_result_listed_by_path(parts, tmp_path):
    first, _ = trained(folder(parts), tmp_path)
    second, _ = trained(folder(parts), tmp_path)
    assert first.refinement == second.refinement
    np.testing.assert_array_equal(first.refinement.paths, sorted(first.refinement.paths))


def test_figures_of_every_round_reach_the_logger(datamodule, tmp_path):
    logger = CSVLogger(tmp_path / "log")
    runner = engine(tmp_path, logger=logger)
    runner.fit(MetaRefine(**SMALL), datamodule=datamodule)
    logger.save()
    text = (tmp_path / "log" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "meta/query_bits_per_dim" in text
    assert "refine/rejected" in text
    assert "image_AUROC" in text  # in validation, where upstream configurations stop early


def test_memory_limit_changes_nothing_but_the_place(datamodule, tmp_path):
    held, _ = trained(datamodule, tmp_path)
    spilled, _ = trained(datamodule, tmp_path, memory_limit_mb=0)
    assert held.refinement == spilled.refinement


def test_not_square_and_squashed(parts, tmp_path, caplog):
    logging.getLogger("anomalib_metarefine").propagate = True
    model, runner = trained(folder(parts), tmp_path, image_size=(64, 160))
    assert "squashed to 64 x 160" in caplog.text
    assert model.model.scorer.patches == 4 * 10
    assert runner.test(model, datamodule=folder(parts))[0]["image_AUROC"] > 0.9


def test_five_flat_images_and_a_last_batch_of_one(tmp_path):
    for name, count in [("train/good", 5), ("test/good", 3), ("test/blob", 3)]:
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), (100, 100, 100 + 40 * ("blob" in name))).save(tmp_path / name / f"{i}.png")
    datamodule = folder(tmp_path, train_batch_size=2, eval_batch_size=2)
    model, runner = trained(datamodule, tmp_path)
    assert all(model.refinement.kept)
    assert runner.test(model, datamodule=datamodule)[0]["image_AUROC"] == 1


def test_one_image(parts, tmp_path):
    for path in sorted((parts / "train/good").iterdir())[1:]:
        path.unlink()
    model, runner = trained(folder(parts), tmp_path)
    assert model.refinement.kept == [True]
    assert np.isfinite(runner.test(model, datamodule=folder(parts))[0]["image_AUROC"])


def test_unreadable_images_are_left_out_listed_and_still_there(parts, tmp_path, caplog):
    logging.getLogger("anomalib_metarefine").propagate = True
    good = parts / "train/good"
    whole = (good / "000.png").read_bytes()
    (good / "empty.png").write_bytes(b"")
    (good / "text.png").write_text("not an image")
    (good / "truncated.png").write_bytes(whole[: len(whole) // 2])
    datamodule = folder(parts)
    model, _ = trained(datamodule, tmp_path)
    assert {p.split("/")[-1] for p in model.refinement.left_out} == {"empty.png", "text.png", "truncated.png"}
    assert "the file is empty" in caplog.text
    assert len(model.refinement.paths) == 24
    assert len(datamodule.train_data) == 27  # the user's datamodule is as it was
    assert len(list(good.iterdir())) == 27


class BrokenError(Exception):
    """Something that goes wrong in a run."""


def fails_without_its_file(model):
    model._init_from = "nowhere.pt"


def fails_in_training(model):
    def training_step(*_):
        raise BrokenError

    model.training_step = training_step


def is_interrupted(model):
    def on_fit_start():
        raise KeyboardInterrupt

    model.on_fit_start = on_fit_start


@pytest.mark.parametrize("spoil", [fails_without_its_file, fails_in_training, is_interrupted])
def test_a_run_that_fails_gives_the_datamodule_back(parts, tmp_path, spoil):
    (parts / "train/good/empty.png").write_bytes(b"")
    datamodule, model = folder(parts), MetaRefine(**SMALL)
    datamodule.val_split_mode = "none"
    spoil(model)
    runner = engine(tmp_path)
    with pytest.raises((FileNotFoundError, BrokenError, SystemExit)):
        runner.fit(model, datamodule=datamodule)
    assert len(datamodule.train_data) == 25
    assert runner.trainer.limit_val_batches == 1.0


def test_trains_without_validation_images(parts, tmp_path):
    datamodule = folder(parts, val_split_mode="none")
    model, runner = trained(datamodule, tmp_path)
    assert np.isfinite(model.post_processor.image_threshold.item())
    assert runner.trainer.limit_val_batches == 1.0
    (metrics,) = runner.test(model, datamodule=datamodule)
    assert metrics["image_F1Score"] > 0.8  # the threshold is the training's own


def test_the_size_follows_the_images_and_stays(tmp_path):
    """Into the checkpoint, into exported graphs, and into the datamodule of a model that is made anew to test it."""
    rng = np.random.default_rng(0)
    for name, count, size, defect in [
        ("train/good", 11, (60, 120), False), ("train/good", 3, (90, 90), False), ("test/good", 4, (60, 120), False),
        ("test/blob", 4, (60, 120), True),
    ]:  # fmt: skip
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            part(rng, size, defect).save(tmp_path / name / f"{size[0]}_{i}.png")
    settings = {key: value for key, value in SMALL.items() if key != "image_size"}
    model, runner = trained(folder(tmp_path), tmp_path, image_size=None)
    assert model.input_size == (192, 352)
    assert read_sidecar(model.to_torch(tmp_path / "exported").parent).input["size"] == [192, 352]
    checkpoint = runner.trainer.checkpoint_callback.best_model_path
    assert load_checkpoint(checkpoint).input_size == (192, 352)

    again, datamodule = MetaRefine(**settings), folder(tmp_path)
    seen = []
    model_forward = again.model.forward
    again.model.forward = lambda images: seen.append(model_forward(images).pred_score) or model_forward(images)
    engine(tmp_path).test(again, datamodule=datamodule, ckpt_path=checkpoint)
    order = [str(path) for path in datamodule.test_data.samples.image_path]
    wanted = raw_scores(load_checkpoint(checkpoint), order).image
    np.testing.assert_allclose(torch.cat(seen).double().numpy(), wanted, rtol=1e-4)


def test_a_size_that_is_given_is_kept(parts, tmp_path):
    model, _ = trained(folder(parts), tmp_path, image_size=(64, 160))
    assert model.input_size == (64, 160)


def test_the_content_of_the_training_images_is_known(parts, tmp_path):
    datamodule = folder(parts)
    model, _ = trained(datamodule, tmp_path)
    first = min((parts / "train/good").iterdir())
    assert model.training_images[str(first)] == file_hash(first)
    datamodule = folder(parts)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    model, runner = MetaRefine(**SMALL), engine(tmp_path)
    runner.fit(model, train_dataloaders=loader)
    assert model.training_images[str(first)] == file_hash(first)
    assert len(model.training_images) == 24


def test_messages_of_the_anomalib_command_come_once():
    program = """
import logging
from anomalib.loggers import configure_logger
configure_logger()
from anomalib_metarefine.logs import log_once
log_once()
logging.getLogger("anything").warning("hello")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count("hello") == 1


def test_nothing_readable(parts, tmp_path):
    for path in (parts / "train/good").iterdir():
        path.write_text("not an image")
    with pytest.raises(ValueError, match="None of the 24 training images can be read"):
        trained(folder(parts), tmp_path)


def deepen(path):
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)


def turn(path):
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)


def make_transparent(path):
    image = Image.open(path).convert("RGBA")
    image.putalpha(100)
    image.save(path)


@pytest.mark.parametrize("change", [deepen, turn, make_transparent])
def test_images_that_anomalib_misreads_are_refused(parts, tmp_path, change):
    change(parts / "train/good/003.png")
    with pytest.raises(ValueError, match=r"misread 1 of 24 training images: .*003\.png .*`metarefine convert DATA"):
        trained(folder(parts), tmp_path)


def test_a_folder_of_constant_images_is_refused(parts, tmp_path):
    for level, path in enumerate((parts / "train/good").iterdir()):
        Image.new("L", (96, 96), level).save(path)
    with pytest.raises(ValueError, match="All 24 training images have a single colour"):
        trained(folder(parts), tmp_path)


def test_mixed_sizes_and_channels(parts, tmp_path):
    good = parts / "train/good"
    Image.open(good / "000.png").resize((50, 130)).save(good / "000.png")
    Image.open(good / "001.png").convert("RGBA").save(good / "001.png")
    Image.open(good / "002.png").convert("1").save(good / "002.png")
    model, _ = trained(folder(parts), tmp_path)
    assert len(model.refinement.paths) == 24


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rule": "tukeyy"}, "no rejection rule"),
        ({"backbone": "resnet81"}, "no backbone"),
        ({"layers": ["blocks.99"]}, "no layer"),
        ({"shrinkage": 1.5}, r"shrinkage must be a number in \[0, 1\], found 1.5"),
        ({"tail": 0}, "tail must be"),
        ({"rounds": -1}, "rounds must be a whole number of at least 0"),
        ({"patch_fence": -1}, "patch_fence must be a number of at least 0, found -1"),
        ({"meta_algorithm": "mamal"}, "meta_algorithm must be one of maml, fomaml, pretraining, found 'mamal'"),
        ({"meta_backend": "jax"}, "meta_backend must be one of torch, learn2learn, found 'jax'"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        MetaRefine(**setting)


def test_unfitted_model_and_wrong_size_say_what_to_do(datamodule, tmp_path):
    with pytest.raises(RuntimeError, match="has not been fitted"):
        MetaRefine(**SMALL).model(torch.zeros(1, 3, 96, 96))
    model, _ = trained(datamodule, tmp_path)
    with pytest.raises(ValueError, match="give 8 x 8 patches"):
        model.model(torch.zeros(1, 3, 128, 128))


def test_small_defects_in_kept_images_are_not_learned_from(spotted):
    images = torch.stack([pil_to_tensor(plate(6.5, spot).convert("RGB")) / 255 for spot in (False, True)])
    rise, shares = {}, {}
    for fence in (2.5, 0):
        # No image is rejected: what is found is found patch by patch.
        model, _ = trained(folder(spotted), spotted, rule="share:0", tail=0.2, patch_fence=fence)
        assert all(model.refinement.kept)
        with torch.no_grad():
            clean, spot = model.eval().model(model.pre_processor.transform(images)).anomaly_map
        rise[fence] = (spot - clean).view(6, 16, 6, 16).mean((1, 3))  # bits per dimension that the spot adds, by patch
        shares[fence] = model.refinement.unusual_patches
    assert shares[0] == 0
    assert 3 * 9 / (24 * 36) <= shares[2.5] < 0.2  # each with its neighbours
    assert rise[2.5][2, 2] > 10 * rise[0][2, 2]
    assert (rise[2.5] - rise[0])[5].abs().max() < rise[2.5][2, 2] / 10  # far from it, all is about as it was


def test_patches_are_all_learned_where_images_are_few_or_not_compared(spotted):
    model, _ = trained(folder(spotted), spotted, rounds=0)
    assert model.refinement.unusual_patches == 0
    for path in sorted((spotted / "train/good").iterdir())[7:]:
        path.unlink()
    model, _ = trained(folder(spotted), spotted, rule="share:0")
    assert model.refinement.unusual_patches == 0


@pytest.fixture
def shared(parts):
    settings = Settings(dimensions=32, meta_steps=2, batch_patches=64)
    found = learn_shared([(parts / "test/good", (96, 96))], settings=settings, progress=False)
    path = parts / "shared" / "start.pt"
    found.save(path)
    return path


def test_a_shared_initialisation_is_trained_from_and_not_needed_afterwards(parts, shared, tmp_path):
    start = SharedInitialisation.load(shared)
    # Nothing is meta-trained here, so the steps do not matter; without adaptation, the flow is the one of the file.
    model, runner = trained(folder(parts), tmp_path, init_from=shared, meta_steps=10**9, adaptation_steps=0)
    torch.testing.assert_close(dict(model.model.flow.state_dict()), dict(start.flow), rtol=0, atol=0)
    assert torch.equal(model.model.scorer.projection, start.whitening.projection)
    assert runner.test(model, datamodule=folder(parts))[0]["image_AUROC"] == 1
    shared.unlink()
    checkpoint = runner.trainer.checkpoint_callback.best_model_path
    loaded = MetaRefine.load_from_checkpoint(checkpoint).eval()
    assert loaded.refinement == model.refinement
    image = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(loaded(image).pred_score, model.eval()(image).pred_score)
    assert engine(tmp_path).test(loaded, datamodule=folder(parts))[0]["image_AUROC"] == 1


def test_a_finished_checkpoint_goes_on_without_the_file_it_began_with(parts, shared, tmp_path):
    model, runner = trained(folder(parts), tmp_path, init_from=str(shared))
    shared.unlink()
    checkpoint = runner.trainer.checkpoint_callback.best_model_path
    again = MetaRefine(**SMALL, init_from=str(shared))
    engine(tmp_path).fit(again, datamodule=folder(parts), ckpt_path=checkpoint)
    assert again.refinement == model.refinement


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 16}, "dimensions is 16 here and 32 there"),
        ({"backbone": "resnet18", "pre_trained": False}, "backbone is 'resnet18' here"),
        ({"init_from": "nowhere.pt"}, r"nowhere\.pt"),
    ],
)
def test_a_wrong_initialisation_is_refused_before_the_backbone_runs(
    parts, shared, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(MetaRefineModel, "embed", lambda *_: pytest.fail("the pass over the images has begun"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trained(folder(parts), tmp_path, **{"init_from": shared, **settings})


@pytest.mark.parametrize("algorithm", ["fomaml", "pretraining"])
def test_other_algorithms_train(datamodule, tmp_path, algorithm):
    model, runner = trained(datamodule, tmp_path, meta_algorithm=algorithm)
    assert model.settings.meta_algorithm == algorithm
    assert runner.test(model, datamodule=datamodule)[0]["image_AUROC"] == 1
