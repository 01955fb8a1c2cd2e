import random
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from anomalib_metarefine.deploy import pipeline
from anomalib_metarefine.deploy.arrivals import look
from anomalib_metarefine.deploy.pipeline import ChangingFileError, Pipeline
from tests.deploy.conftest import grey, pixels, save


class Detector:
    """Answers late and in another order; counts what it holds."""

    streams, bit_depth = 2, None

    def __init__(self, wait=lambda: 0.004 * random.random()):
        self.wait, self.held, self.most = wait, 0, 0
        self.pool = ThreadPoolExecutor(8)

    def submit(self, image, anomaly_map):
        self.held += 1
        self.most = max(self.most, self.held)

        def answer():
            time.sleep(self.wait())
            return 255 * image.mean()

        return self.pool.submit(answer)


@pytest.fixture
def files(tmp_path):
    return [look(str(save(tmp_path / f"{i}.png", grey(50 + i)))) for i in range(60)]


def test_the_order_stays_and_memory_is_bounded(files):
    detector, done = Detector(), []

    def finish(job):
        detector.held -= 1
        done.append(job)

    line = Pipeline(detector, finish)
    for arrival in files:
        line.push(arrival)
    line.flush()
    line.close()
    assert [job.arrival for job in done] == files
    assert [job.prediction for job in done] == pytest.approx([50 + i for i in range(60)], abs=1)
    assert detector.most <= 2 * detector.streams + 1
    assert all(job.image is None for job in done)


def test_one_image_stops_no_other(files, monkeypatch):
    class Failing(Detector):
        def submit(self, image, anomaly_map):
            if round(255 * image.mean()) == 53:
                raise RuntimeError("device lost")
            if round(255 * image.mean()) == 55:
                return Future()  # never answers
            return super().submit(image, anomaly_map)

    monkeypatch.setattr(pipeline, "_LONGEST_S", 0.2)
    done = []
    line = Pipeline(Failing(), done.append)
    for arrival in files[:8]:
        line.push(arrival)
    line.flush()
    line.close()
    errors = {i: str(job.error) for i, job in enumerate(done) if job.error}
    assert errors == {3: "device lost", 5: "The model gave no answer within 0 seconds."}


def test_a_file_that_changes_while_it_is_read(files):
    done = []
    line = Pipeline(Detector(), done.append)
    line.push(files[0]._replace(size=files[0].size - 1))
    line.flush()
    line.close()
    assert isinstance(done[0].error, ChangingFileError)
    assert done[0].prediction is None


def test_the_image_is_kept_for_its_heat_map(files):
    done = []
    line = Pipeline(Detector(), done.append, anomaly_maps=True)
    line.push(files[0])
    line.flush()
    line.close()
    np.testing.assert_allclose(done[0].image, pixels(50), rtol=1e-6)
