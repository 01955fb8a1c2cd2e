"""Results that nobody measured, for tests of tables and figures. Not a single figure here is real."""

import numpy as np
import pandas as pd

from anomalib_metarefine.benchmark.report.cells import REFINED, UNREFINED
from anomalib_metarefine.benchmark.table import COLUMNS, Row

MODELS = (REFINED, UNREFINED, "DFM", "FastFlow", "PaDiM", "PatchCore", "SoftPatch")
DATA = (("made-up-cells", ""), ("made-up-parts", "bolt"), ("made-up-parts", "nut"), ("made-up-belts", ""), ("flat", ""))
SHARES = (0.0, 0.1, 0.2, 0.4)


def results(models=MODELS, data=DATA, shares=SHARES, seeds=(0, 1, 2), seed=0, **fields):
    """A whole grid; figures depend on the cell and on ``seed`` alone, and ``fields`` are the same in all rows."""
    rows = []
    for m, model in enumerate(models):
        for place, (name, category) in enumerate(data):
            for share in shares:
                for run in seeds:
                    rows += _cell(m, model, place, name, category, share, run, seed, fields)
    return pd.DataFrame(rows, columns=COLUMNS)


def _cell(m, model, place, name, category, share, run, seed, fields):
    rng = np.random.default_rng([seed, m, place, int(100 * share), run])
    top = 0.97 - 0.03 * place - 0.01 * m + rng.normal(0, 0.006)
    lost = share * (0.15 + 0.08 * m) * (0.2 if model == REFINED else 1)
    curation = np.random.default_rng([seed, place, int(100 * share), run])  # the same for all models
    recall = curation.uniform(0.5, 0.8) if share and place < 3 else 0.0
    own = rng.uniform(0.6, 0.9) if recall and model == REFINED else 0.0
    auroc = {"raw": top - lost, "curated": top - lost * (1 - recall), "clean": top - 0.02 * share}
    for training, value in auroc.items():
        left_out = {"raw": own, "curated": max(own, recall), "clean": 1.0}[training] if share else 0.0
        dirty = 200 * share
        yield {
            **{field: getattr(Row, field, "") for field in COLUMNS},
            **{"data": name, "category": category, "image_size": "256x256", "train_images": 200},
            **{"backbone": "a_backbone", "protocol": "replace", "overlap": "no-overlap", "contamination": share},
            **{"seed": run, "model": model, "settings": f'{{"class_path": "made_up.{model}"}}', "training": training},
            **{"image_AUROC": value, "image_AUPR": value - 0.05, "image_F1Max": value - 0.1},
            **({"pixel_AUROC": value - 0.01, "pixel_AUPRO": value - 0.1} if place in (1, 2) else {}),
            **{"rejected": round(left_out * dirty), "kept": 200 - round(left_out * dirty)},
            **{"precision": 0.9 if left_out else np.nan, "recall": left_out if share else np.nan},
            **{"fit_seconds": 2.0 * 3**m * rng.uniform(0.8, 1.2), "feature_seconds": 5.0, "test_seconds": 3.0 + m},
            **{"images_per_second": 40 / (1 + m), "peak_memory_mb": 200.0 + 300 * m, "model_mb": 15.0 + 30 * m},
            **{"test_normal": 100, "test_abnormal": 80, "versions": "made up 1.0", "machine": "no machine"},
            **{"date": f"2031-01-0{run + 1}T00:00:00+00:00"},
            **fields,
        }


def failed(rows, reason, **where):
    """The same rows, those where columns have the given values with a reason instead of figures."""
    rows = rows.copy()
    hit = np.logical_and.reduce([rows[name] == value for name, value in where.items()])
    rows.loc[hit, "reason"] = reason
    figures = COLUMNS[COLUMNS.index("image_AUROC") : COLUMNS.index("kept")]
    rows.loc[hit, figures] = np.nan
    rows.loc[hit, ["kept", "rejected"]] = 0
    return rows
