import subprocess
import sys
from concurrent.futures import wait

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2 import Resize

from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.arrivals import look
from anomalib_metarefine.deploy.detector import Detector, resized
from anomalib_metarefine.deploy.pipeline import Pipeline
from anomalib_metarefine.deploy.sidecar import read_sidecar, write_sidecar
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.export import export_model
from tests.deploy.conftest import brightness_model, brightness_onnx, pixels


def real_files(count):
    files = make_elpv_samples(packaged_root(), "mono").image_path
    return list(files[:: len(files) // count][:count])


def turned(pixels, file):
    """As a phone saves it that is held upright: on its side, with a tag."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(file, exif=exif)


def sixteen_bits(pixels, file):
    levels = pixels[..., 0].astype(np.uint16)
    Image.fromarray(levels * 257 + (levels * 37) % 256).save(file)


def with_alpha(pixels, file):
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[:60, :90] = 40
    Image.fromarray(np.dstack([pixels, alpha])).save(file)


@pytest.mark.parametrize("kind", [turned, sixteen_bits, with_alpha])
def test_files_of_all_kinds_score_as_their_pixels_do(trained, tmp_path, kind):
    """The line, torch and plain OpenVINO; what Pillow alone makes of the file is another image."""
    file = tmp_path / "cell.png"
    shown = np.asarray(Image.open(real_files(3)[1]).convert("RGB"))[:260]
    kind(shown, file)
    image = read_image(file).pixels
    done = []
    line = Pipeline(Detector(trained.folder), done.append)
    line.push(look(str(file)))
    line.flush()
    line.close()
    batch = image.transpose(2, 0, 1)[None]
    network = ov.Core().compile_model(trained.folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = done[0].prediction.score
    assert found == pytest.approx(network(batch)["pred_score"].item(), abs=1e-5)
    assert found == pytest.approx(torch_score(trained.model, batch), rel=1e-3, abs=1e-5)
    other = (np.asarray(Image.open(file).convert("RGB")) / np.float32(255)).transpose(2, 0, 1)[None]
    assert abs(found - torch_score(trained.model, other)) > 1e-3


def torch_score(model, batch):
    post = model.post_processor
    with torch.no_grad():
        raw = model.model(model.pre_processor.transform(torch.from_numpy(batch))).pred_score
    return post._normalize(raw, post.image_min, post.image_max, post.image_threshold).item()


@pytest.mark.parametrize(("given", "expected"), [(None, 12), (16, 16)])
def test_bit_depth_of_the_training_or_of_the_caller(brightness, tmp_path, given, expected):
    sidecar = read_sidecar(brightness)
    sidecar.input["bit_depth"] = 12
    write_sidecar(brightness, sidecar)
    Image.fromarray(np.full((24, 32), 3000, np.uint16)).save(tmp_path / "deep.png")
    done, detector = [], Detector(brightness, bit_depth=given)
    line = Pipeline(detector, done.append)
    line.push(look(str(tmp_path / "deep.png")))
    line.flush()
    line.close()
    assert done[0].prediction.score == pytest.approx(3000 / (2**expected - 1), abs=1e-6)
    assert detector.fingerprint != Detector(brightness, bit_depth=8).fingerprint


class TestDecisions:
    @pytest.mark.parametrize(
        ("level", "decision"), [(80, "normal"), (125, "uncertain"), (130, "uncertain"), (150, "anomalous")]
    )
    def test_with_a_calibration(self, brightness, level, decision):
        prediction = Detector(brightness).predict(pixels(level))
        assert prediction.score == pytest.approx(level / 255, abs=1e-3)
        assert prediction.raw_score == pytest.approx(20 * level / 255, abs=0.02)
        assert prediction.decision == decision
        assert prediction.anomaly_map is None
        assert 0 < prediction.latency_s < 10

    @pytest.mark.parametrize(("level", "decision"), [(125, "normal"), (130, "anomalous")])
    def test_without_a_sidecar(self, tmp_path, level, decision):
        detector = Detector(brightness_model(tmp_path, sidecar=False))
        prediction = detector.predict(pixels(level))
        assert (prediction.decision, prediction.raw_score) == (decision, None)
        assert (detector.threshold, detector.uncertain, detector.calibration) == (None, None, None)

    def test_with_a_moved_threshold(self, brightness):
        detector = Detector(brightness)
        assert detector.decide(False, 9.9) == "uncertain"
        assert detector.decide(False, 9.9, 12.0) == "normal"  # the band has moved along
        assert detector.decide(True, 11.7, 12.0) == "uncertain"
        assert detector.decide(False, 9.9, 9.0) == "anomalous"

    def test_map(self, brightness):
        image = np.full((16, 16, 3), 0.2, np.float32)
        image[4:8, 4:8] = 1
        scores = Detector(brightness).predict(image, anomaly_map=True).anomaly_map
        np.testing.assert_allclose(scores, image[..., 0], rtol=1e-6)


def test_sizes_come_and_go(brightness):
    detector = Detector(brightness, streams=2)
    images = [pixels(60 + i, size=(16 + 2 * (i % 4), 16 + 3 * (i % 5)), seed=i) for i in range(40)]
    answers = [detector.submit(image) for image in images]
    wait(answers)
    assert [answer.result().score for answer in answers] == pytest.approx([image.mean() for image in images])


SIZES = ((128, 128), (200, 640), (640, 200), (97, 1500), (300, 300), (1024, 1024), (50, 61), (128, 300))


def test_resizing_before_the_network_scores_as_the_graph_does(trained):
    """One network for all sizes, where ``metadata.json`` says that the graph begins with just that resize."""
    detector = Detector(trained.folder)
    assert detector.sidecar.input["antialias"] is True
    network = ov.Core().compile_model(trained.folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for file, size in zip(real_files(len(SIZES)), SIZES, strict=True):
        image = np.ascontiguousarray(cv2.resize(read_image(file).pixels, size[::-1], interpolation=cv2.INTER_CUBIC))
        answer = network(image.transpose(2, 0, 1)[None])
        found = detector.predict(image, anomaly_map=True)
        assert found.score == pytest.approx(answer["pred_score"].item(), abs=1e-5)
        np.testing.assert_allclose(found.anomaly_map, answer["anomaly_map"][0, 0], atol=1e-4)
        assert found.score == pytest.approx(torch_score(trained.model, image.transpose(2, 0, 1)[None]), rel=1e-3)


def test_the_resize_is_that_of_the_training():
    image = np.random.default_rng(0).uniform(0, 1, (201, 333, 3)).astype(np.float32)
    for size in ((64, 64), (256, 128), (400, 500)):
        wanted = Resize(size, antialias=True)(torch.from_numpy(image).permute(2, 0, 1)).numpy()
        np.testing.assert_allclose(resized(image, size), wanted, atol=3e-5)


def test_a_graph_that_resizes_otherwise_is_left_to_it(trained, tmp_path):
    """Its own resize is not antialiased, so resizing before it would give other scores than its checkpoint's."""
    folder = export_model(trained.model, tmp_path, exact_resize=False).parent
    detector = Detector(folder)
    network = ov.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = read_image(real_files(1)[0]).pixels
    score = detector.predict(image).score
    assert score == pytest.approx(network(image.transpose(2, 0, 1)[None])["pred_score"].item(), abs=1e-6)
    assert abs(score - Detector(trained.folder).predict(image).score) > 1e-4


class TestRefuses:
    def test_a_changed_model(self, brightness):
        (brightness / "model.bin").write_bytes(b"else")
        with pytest.raises(ValueError, match=r"model\.bin is not the file that was exported"):
            Detector(brightness)

    @pytest.mark.parametrize("threshold", ['"10"', "[1]", "true"])
    def test_a_threshold_that_is_no_number(self, brightness, threshold):
        text = (brightness / "metadata.json").read_text()
        (brightness / "metadata.json").write_text(text.replace('"threshold": 10.0', f'"threshold": {threshold}'))
        with pytest.raises(ValueError, match=r"metadata\.json must hold numbers or null as image_score"):
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
        assert detector.predict(pixels(100)).decision == "normal"
        with pytest.raises(ValueError, match="takes images of 24 x 32 pixels, found 32 x 24"):
            detector.predict(pixels(100, size=(32, 24)))

    @pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)])
    def test_other_arrays(self, brightness, image):
        with pytest.raises(ValueError, match=r"Expected an image \[H, W, 3\] of float32"):
            Detector(brightness).predict(image)

    def test_no_stream(self, brightness):
        with pytest.raises(ValueError, match="streams must be at least 1"):
            Detector(brightness, streams=0)


def test_exits_while_images_are_in_flight(brightness):
    code = "import sys, numpy as np; from anomalib_metarefine.deploy.detector import Detector\n"
    code += "detector = Detector(sys.argv[1], streams=4)\n"
    code += "answers = [detector.submit(np.zeros((2000, 2000, 3), np.float32)) for _ in range(4)]"
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, brightness], check=True)


def test_fingerprint_follows_the_files(brightness, tmp_path):
    before = Detector(brightness).fingerprint
    assert Detector(brightness).fingerprint == before
    text = (brightness / "metadata.json").read_text()
    (brightness / "metadata.json").write_text(text.replace("9.5", "9.25"))
    assert Detector(brightness).fingerprint != before


def test_onnx(tmp_path):
    prediction = Detector(brightness_onnx(tmp_path)).predict(pixels(150), anomaly_map=True)
    assert prediction.score == pytest.approx(150 / 255, abs=1e-3)
    assert prediction.decision == "anomalous"
    assert prediction.anomaly_map.shape == (24, 32)


def test_scores_like_the_checkpoint(trained):
    model, folder, _ = trained
    detector, post = Detector(folder, streams=2), model.post_processor
    images = [read_image(path).pixels for path in real_files(6)]
    images += [cv2.resize(images[0], (420, 260))]
    answers = [detector.submit(image, anomaly_map=True) for image in images]
    for image, answer in zip(images, answers, strict=True):
        with torch.no_grad():
            raw = model.model(model.pre_processor.transform(torch.from_numpy(image).permute(2, 0, 1)[None]))
        expected = post._normalize(raw.pred_score, post.image_min, post.image_max, post.image_threshold).item()
        found = answer.result()
        assert found.score == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found.score == pytest.approx(detector.predict(image).score, abs=1e-6)
        assert found.anomaly_map.shape == tuple(raw.anomaly_map.shape[-2:])
        if found.raw_score is not None and 0 < found.score < 1:
            assert found.raw_score == pytest.approx(raw.pred_score.item(), rel=1e-3)
