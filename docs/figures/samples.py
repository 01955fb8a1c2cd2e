"""Three sample results for the model's README: defective solar cells of ELPV, each beside what the model explains.

    python docs/figures/samples.py [--out docs/figures/samples.png]

Trained on 150 cells of which a fifth is defective, nothing said about which. The cells are the first three defective
ones of the test set, not chosen by how well they do.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image, ImageDraw

from anomalib_metarefine import ELPV, Contaminated, MetaRefine

_SIDE, _TEXT, _GAP = 220, 18, 6


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    datamodule = Contaminated(ELPV("mono", train_images=150), 0.2, seed=0)
    model = MetaRefine(visualizer=False, evaluator=False)
    with tempfile.TemporaryDirectory() as folder:
        Engine(default_root_dir=folder, logger=False, limit_val_batches=0).fit(model, datamodule=datamodule)
    samples = datamodule.test_data.samples
    picture = Image.new("RGB", (3 * (2 * _SIDE + _GAP), _SIDE + _TEXT), "white")
    draw = ImageDraw.Draw(picture)
    for number, path in enumerate(samples.image_path[samples.label_index == 1].head(3)):
        found, left = model.explain(path), number * (2 * _SIDE + _GAP)
        decision = "anomalous" if found.score > found.threshold else "normal"
        draw.text((left, 2), f"score {found.score:.2f}, threshold {found.threshold:.2f}: {decision}", "black")
        for place, shown in enumerate((Image.open(path).convert("RGB"), found.picture())):
            picture.paste(shown.resize((_SIDE, _SIDE)), (left + place * _SIDE, _TEXT))
    picture.quantize(128).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
