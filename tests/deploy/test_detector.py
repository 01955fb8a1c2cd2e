import io
import itertools
import subprocess
import sys
from concurrent.futures import wait

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data.utils import read_image as anomalib_read_image
from PIL import Image

from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy import detector as runtime
from anomalib_metarefine.deploy.detector import Detector, UnreadableImageError, read_image
from tests.deploy.conftest import brightness_model, brightness_onnx, grey, save

RNG = np.random.default_rng(0)


def real_files(count):
    files = make_elpv_samples(packaged_root(), "mono").image_path
    return list(files[:: len(files) // count][:count])


class TestReadImage:
    """The line sees the pixels that the training saw."""

    def same(self, path):
        image = read_image(path)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image / 255.0, anomalib_read_image(path))
        trained_on = anomalib_read_image(path, as_tensor=True)
        np.testing.assert_array_equal(image.transpose(2, 0, 1), (trained_on * 255).round().byte().numpy())
        return image

    def test_of_real_files(self):
        for path in real_files(10):
            self.same(path)

    @pytest.mark.parametrize(
        ("suffix", "mode"),
        [
            *itertools.product(["png", "tif", "webp"], ["L", "RGB", "RGBA", "P", "LA", "1", "I;16"]),
            *itertools.product(["bmp", "jpg"], ["L", "RGB", "1"]),
            *[("jpg", "CMYK"), ("tif", "CMYK"), ("tif", "F"), ("bmp", "RGBA"), ("bmp", "P")],
        ],
    )
    def test_of_every_kind(self, tmp_path, suffix, mode):
        pixels = RNG.integers(0, 256, (20, 33, 3), dtype=np.uint8)
        if mode == "I;16":
            image = Image.fromarray((RNG.integers(0, 65536, (20, 33))).astype(np.uint16))
        elif mode == "F":
            image = Image.fromarray(RNG.uniform(0, 300, (20, 33)).astype(np.float32))
        else:
            image = Image.fromarray(pixels).convert(mode)
        path = tmp_path / f"image.{suffix}"
        image.save(path)
        assert self.same(path).shape == (20, 33, 3)

    def test_that_exif_says_is_turned(self, tmp_path):
        """OpenCV would turn it."""
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(RNG.integers(0, 256, (20, 33, 3), dtype=np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
        assert self.same(tmp_path / "turned.jpg").shape == (20, 33, 3)
        assert cv2.imread(str(tmp_path / "turned.jpg")).shape == (33, 20, 3)

    def test_from_memory(self, tmp_path):
        path = save(tmp_path / "a.png", grey(100))
        np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), read_image(path))

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
    @pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
    def test_that_is_cut_off(self, tmp_path, suffix, share):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(RNG.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(UnreadableImageError, match=f"image.{suffix} can't be read as an image"):
            read_image(path)

    def test_that_is_none(self, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(UnreadableImageError):
            read_image(tmp_path / "text.png")
        with pytest.raises(FileNotFoundError):
            read_image(tmp_path / "missing.png")


class TestDecisions:
    @pytest.mark.parametrize(
        ("level", "decision"), [(80, "normal"), (125, "uncertain"), (130, "uncertain"), (150, "anomalous")]
    )
    def test_with_a_calibration(self, brightness, level, decision):
        prediction = Detector(brightness).predict(grey(level))
        assert prediction.score == pytest.approx(level / 255, abs=1e-3)
        assert prediction.raw_score == pytest.approx(20 * level / 255, abs=0.02)
        assert prediction.decision == decision
        assert prediction.anomaly_map is None
        assert 0 < prediction.latency_s < 10

    @pytest.mark.parametrize(("level", "decision"), [(125, "normal"), (130, "anomalous")])
    def test_without_a_sidecar(self, tmp_path, level, decision):
        detector = Detector(brightness_model(tmp_path, sidecar=False))
        prediction = detector.predict(grey(level))
        assert (prediction.decision, prediction.raw_score) == (decision, None)
        assert (detector.threshold, detector.uncertain, detector.calibration) == (None, None, None)

    def test_with_a_moved_threshold(self, brightness):
        detector = Detector(brightness)
        assert detector.decide(False, 9.9) == "uncertain"
        assert detector.decide(False, 9.9, 12.0) == "normal"  # the band has moved along
        assert detector.decide(True, 11.7, 12.0) == "uncertain"
        assert detector.decide(False, 9.9, 9.0) == "anomalous"

    def test_map(self, brightness):
        image = np.full((16, 16, 3), 51, np.uint8)
        image[4:8, 4:8] = 255
        scores = Detector(brightness).predict(image, anomaly_map=True).anomaly_map
        np.testing.assert_allclose(scores, image[..., 0] / 255, rtol=1e-6)


def test_sizes_come_and_go(brightness, monkeypatch):
    monkeypatch.setattr(runtime, "_SIZES_KEPT", 2)
    detector = Detector(brightness, streams=2)
    images = [grey(60 + i, size=(16 + 2 * (i % 4), 16 + 3 * (i % 5)), seed=i) for i in range(40)]
    answers = [detector.submit(image) for image in images]
    wait(answers)
    assert [answer.result().score for answer in answers] == pytest.approx([image.mean() / 255 for image in images])
    assert len(detector._networks) == 2


class TestRefuses:
    def test_a_changed_model(self, brightness):
        (brightness / "model.bin").write_bytes(b"else")
        with pytest.raises(ValueError, match=r"model\.bin is not the file that was exported"):
            Detector(brightness)

    @pytest.mark.parametrize("threshold", ['"10"', "[1]", "true"])
    def test_a_threshold_that_is_no_number(self, brightness, threshold):
        text = (brightness / "metadata.json").read_text()
        (brightness / "metadata.json").write_text(text.replace('"threshold": 10.0', f'"threshold": {threshold}'))
        with pytest.raises(ValueError, match=r"metadata\.json must hold numbers in image_score"):
            Detector(brightness)

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(FileNotFoundError, match=r"expected model\.xml or model\.onnx, found notes\.txt"):
            Detector(tmp_path)

    def test_what_is_no_model(self, tmp_path):
        (tmp_path / "model.xml").write_text("<net>")
        with pytest.raises(ValueError, match=r"model\.xml can't be read as a model"):
            Detector(tmp_path)

    def test_another_graph(self, tmp_path):
        parameter = ov.opset13.parameter([1, 3, 8, 8], np.float32)
        ov.save_model(ov.Model([ov.opset13.relu(parameter)], [parameter], "relu"), tmp_path / "model.xml")
        with pytest.raises(ValueError, match="the outputs anomaly_map, pred_label, pred_score are missing"):
            Detector(tmp_path)

    @pytest.mark.parametrize("sidecar", [True, False])
    def test_another_size(self, tmp_path, sidecar):
        detector = Detector(brightness_model(tmp_path, accepts=[24, 32], sidecar=sidecar))
        assert detector.predict(grey(100)).decision == "normal"
        with pytest.raises(ValueError, match="takes images of 24 x 32 pixels, found 32 x 24"):
            detector.predict(grey(100, size=(32, 24)))

    @pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
    def test_other_arrays(self, brightness, image):
        with pytest.raises(ValueError, match=r"Expected an image \[H, W, 3\] of uint8"):
            Detector(brightness).predict(image)

    def test_no_stream(self, brightness):
        with pytest.raises(ValueError, match="streams must be at least 1"):
            Detector(brightness, streams=0)


def test_exits_while_images_are_in_flight(brightness):
    code = "import sys, numpy as np; from anomalib_metarefine.deploy.detector import Detector\n"
    code += "detector = Detector(sys.argv[1], streams=4)\n"
    code += "answers = [detector.submit(np.zeros((2000, 2000, 3), np.uint8)) for _ in range(4)]"
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, brightness], check=True)


def test_fingerprint_follows_the_files(brightness, tmp_path):
    before = Detector(brightness).fingerprint
    assert Detector(brightness).fingerprint == before
    text = (brightness / "metadata.json").read_text()
    (brightness / "metadata.json").write_text(text.replace("9.5", "9.25"))
    assert Detector(brightness).fingerprint != before


def test_imports_neither_torch_nor_anomalib():
    code = "import sys, anomalib_metarefine.deploy.detector, anomalib_metarefine.deploy.watch\n"
    code += "print([m for m in ('torch', 'anomalib', 'lightning', 'pandas', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_onnx(tmp_path):
    prediction = Detector(brightness_onnx(tmp_path)).predict(grey(150), anomaly_map=True)
    assert prediction.score == pytest.approx(150 / 255, abs=1e-3)
    assert prediction.decision == "anomalous"
    assert prediction.anomaly_map.shape == (24, 32)


def test_scores_like_the_checkpoint(trained):
    model, folder, _ = trained
    detector, post = Detector(folder, streams=2), model.post_processor
    images = [read_image(path) for path in real_files(6)]
    images += [np.asarray(Image.fromarray(images[0]).resize((420, 260)))]
    answers = [detector.submit(image, anomaly_map=True) for image in images]
    for image, answer in zip(images, answers, strict=True):
        batch = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
        with torch.no_grad():
            raw = model.model(model.pre_processor.transform(batch))
        expected = post._normalize(raw.pred_score, post.image_min, post.image_max, post.image_threshold).item()
        found = answer.result()
        assert found.score == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found.score == pytest.approx(detector.predict(image).score, abs=1e-6)
        assert found.anomaly_map.shape == tuple(raw.anomaly_map.shape[-2:])
        if found.raw_score is not None and 0 < found.score < 1:
            assert found.raw_score == pytest.approx(raw.pred_score.item(), rel=1e-3)
