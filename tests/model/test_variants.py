"""One model of several products: trained from several folders, exported, and right about each."""

import json
import os
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning import seed_everything

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.quantization import _kept_in_float
from tests.model.test_export import EXACT, Exported, assert_parity, real_images

SIZE = (96, 96)


def some(kind: str, count: int) -> list[str]:
    samples = make_elpv_samples(packaged_root(), kind)
    return samples.image_path[samples.label_index == 0].tolist()[:count]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Exported:
    """Trained on solar cells of two kinds, a folder each, with a stock datamodule."""
    root = tmp_path_factory.mktemp("variants")
    for kind in ("mono", "poly"):
        (root / kind).mkdir()
        for path in some(kind, 12):
            os.link(path, root / kind / Path(path).name)
    datamodule = Folder("cells", root=root, normal_dir=["mono", "poly"], val_split_mode="none", num_workers=0)
    seed_everything(0, verbose=False)
    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu")
    model = MetaRefine(image_size=SIZE, variants="folders", meta_steps=1, visualizer=False)
    engine.fit(model, datamodule=datamodule)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    paths = {
        kind: Engine(accelerator="cpu").export(MetaRefine(), export_root=root / kind, ckpt_path=checkpoint, **setting)
        for kind, setting in {"torch": {"export_type": "torch"}, "FP32": {"export_type": "openvino"}}.items()
    }
    return Exported(load_checkpoint(checkpoint), paths)


def test_each_product_is_a_variant_and_everything_says_so(two):
    assert "variants=2" in repr(two.model)
    assert "2 variants, as given: mono (10 images), poly (10 images)" in two.model.refinement.structure
    metadata = json.loads((two.paths["FP32"].parent / "metadata.json").read_text())
    assert metadata["training"]["variants"] == 2


def both() -> list[np.ndarray]:
    return [image for kind in ("mono", "poly") for image in real_images(some(kind, 24)[12:], 3, SIZE)]


def test_parity(two):
    assert_parity(two, both(), kinds=("torch", "FP32"))


def test_a_batch_of_both_is_scored_image_by_image(two):
    network = ov.Core().compile_model(two.paths["FP32"], "CPU", EXACT)
    alone = [network(image)["pred_score"].item() for image in both()]
    np.testing.assert_allclose(network(np.concatenate(both()))["pred_score"].ravel(), alone, rtol=1e-4)


def test_images_are_scored_under_their_own_variant(two):
    images = two.model.pre_processor.transform(torch.from_numpy(np.concatenate(both())))
    model = two.model.model
    with torch.no_grad():
        chosen = model.scorer._fits_best(model.embed(images)[0] @ model.scorer.projection)
    assert chosen.tolist() == [0, 0, 0, 1, 1, 1]


def test_eight_bits_are_for_the_backbone_alone(two):
    network = ov.Core().read_model(two.paths["FP32"])
    kept = set(_kept_in_float(network))
    quantized = [node.get_type_name() for node in network.get_ops() if node.get_friendly_name() not in kept]
    assert sum(name.endswith("Convolution") for name in quantized) > 20
    assert "MatMul" not in quantized
