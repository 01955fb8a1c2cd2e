"""`metarefine serve`, asked by clients: a real one of the protocol, the example's, and plain HTTP."""

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.images.reading import read_image
from tests.deploy.conftest import brightness_model, grey, save
from tests.deploy.receivers import until
from tests.deploy.test_examples import run_alone
from tests.deploy.test_watch import fill, images, once

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")


class Served:
    """A server in a thread, and questions to it."""

    def __init__(self, folder, largest=1_000_000):
        from anomalib_metarefine.deploy.server import make_app

        self.detector = Detector(folder, streams=2)
        config = uvicorn.Config(make_app(self.detector, "line7", largest), port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.address = f"127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def ask(self, path, body=None, **headers):
        """Code and content of an answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            with urlopen(Request(f"http://{self.address}{path}", body, named), timeout=30) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)

    def infer(self, datatype, shape, data, outputs=()):
        tensor = {"name": "input", "datatype": datatype, "shape": shape, "data": data}
        body = {"inputs": [tensor], "id": "7", "outputs": [{"name": name} for name in outputs]}
        code, answer = self.ask("/v2/models/line7/infer", body)
        assert code == 200, answer
        assert (answer["model_name"], answer["id"]) == ("line7", "7")
        return {one["name"]: one["data"] for one in answer["outputs"]}

    def end(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = brightness_model(
        tmp_path_factory.mktemp("served") / "m", quantiles=np.linspace(6, 8, 101), band=(9.5, 10.5)
    )
    found = Served(model)
    yield found
    found.end()


@pytest.fixture
def lines(served, tmp_path):
    """What `watch` says of three images."""
    once(served.detector.folder, fill(tmp_path / "in", [100, 128, 200]), tmp_path / "r.jsonl")
    return images(tmp_path / "r.jsonl")


KEYS = ("score", "raw_score", "threshold", "decision")


def content(line):
    with open(line["path"], "rb") as file:  # noqa: PTH123
        return file.read()


def test_an_image_file_scores_as_in_watch(served, lines):
    for line in lines:
        code, answer = served.ask("/v1/score", content(line))
        assert code == 200
        assert {key: answer[key] for key in KEYS} == {key: line[key] for key in KEYS}
        assert answer["latency_ms"] > 0


@pytest.mark.parametrize("kind", ["BYTES", "UINT8", "FP32"])
def test_tensors_in_json_score_as_in_watch(served, lines, kind):
    levels = np.stack([np.asarray(Image.open(line["path"])) for line in lines])
    pixels = np.stack([read_image(line["path"]).pixels for line in lines]).transpose(0, 3, 1, 2)
    data = {"UINT8": levels.tolist(), "FP32": pixels.ravel().tolist()}
    data["BYTES"] = [base64.b64encode(content(line)).decode() for line in lines]
    shape = {"UINT8": levels.shape, "FP32": pixels.shape, "BYTES": (3,)}[kind]
    found = served.infer(kind, shape, data[kind])
    assert sorted(found) == ["decision", "pred_label", "pred_score", "raw_score", "threshold"]
    names = ("pred_score", "raw_score", "threshold", "decision")
    assert [found[name] for name in names] == [[line[key] for line in lines] for key in KEYS]
    assert found["pred_label"] == [False, True, True]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["BYTES", "UINT8", "FP32"])
def test_a_client_of_triton_gets_what_watch_says(served, lines, kind, binary):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    client = http.InferenceServerClient(served.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("line7")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    about = client.get_model_metadata("line7", "1")
    assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
    values = {"UINT8": np.stack([np.asarray(Image.open(line["path"])) for line in lines])}
    values["FP32"] = np.stack([read_image(line["path"]).pixels for line in lines]).transpose(0, 3, 1, 2)
    values["BYTES"] = np.array([content(line) for line in lines], dtype=object)
    tensor = http.InferInput("input", values[kind].shape, kind)
    tensor.set_data_from_numpy(values[kind], binary_data=binary or kind == "BYTES")
    names = [one["name"] for one in about["outputs"]]
    wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in names]
    answer = client.infer("line7", [tensor], outputs=wanted, request_id="a")
    found = {name: answer.as_numpy(name) for name in names}
    assert found["pred_score"].tolist() == [line["score"] for line in lines]
    assert found["raw_score"].tolist() == [line["raw_score"] for line in lines]
    decisions = [one.decode() if isinstance(one, bytes) else one for one in found["decision"].tolist()]
    assert decisions == [line["decision"] for line in lines]
    maps = [served.detector.predict(read_image(line["path"]).pixels, anomaly_map=True).anomaly_map for line in lines]
    assert np.array_equal(found["anomaly_map"][:, 0], np.stack(maps))
    unasked = client.infer("line7", [tensor])
    assert unasked.as_numpy("pred_score").tolist() == found["pred_score"].tolist()
    assert unasked.as_numpy("anomaly_map") is None
    client.close()


def test_the_client_for_model_server_takes_it_as_well(served, lines):
    rows = run_alone("model_server_client.py", f"http://{served.address}", "line7", *(line["path"] for line in lines))
    assert [float(row[1]) for row in rows] == pytest.approx([line["score"] for line in lines], abs=1e-6)


def test_deep_files_are_read_as_in_watch(tmp_path):
    levels = (grey(100)[..., 0].astype(np.uint16) * 16).astype(np.uint16)
    save(tmp_path / "in" / "deep.png", levels)
    model = brightness_model(tmp_path / "m")
    once(model, tmp_path / "in", tmp_path / "r.jsonl")
    (line,) = images(tmp_path / "r.jsonl")
    found = Served(model)
    assert found.ask("/v1/score", content(line))[1]["score"] == line["score"] < 0.1
    found.end()


def test_without_metadata_there_are_no_raw_scores(tmp_path):
    found = Served(brightness_model(tmp_path / "plain", sidecar=False))
    answer = found.ask("/v1/score", save(tmp_path / "a.png", grey(200)).read_bytes())[1]
    assert (answer["decision"], answer["raw_score"], answer["threshold"]) == ("anomalous", None, None)
    found_names = [one["name"] for one in found.ask("/v2/models/line7")[1]["outputs"]]
    assert found_names == ["pred_score", "pred_label", "decision", "anomaly_map"]
    assert sorted(found.infer("UINT8", [1, 1, 1, 3], [9, 9, 9])) == ["decision", "pred_label", "pred_score"]
    found.end()


GOOD = {"name": "input", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
INFER = "/v2/models/line7/infer"


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "headers", "code", "said"),
    [
        ("/v2/models/other/infer", {"inputs": [GOOD]}, {}, 404, "no model other of version 1; there is line7"),
        ("/v2/models/line7/versions/2/infer", {"inputs": [GOOD]}, {}, 404, "no model line7 of version 2"),
        ("/nothing", None, {}, 404, "Not Found"),
        (INFER, None, {}, 405, "Method Not Allowed"),
        (INFER, b"{", {}, 400, "expected JSON with one tensor"),
        (INFER, {"inputs": []}, {}, 400, "expected JSON with one tensor"),
        (INFER, {"inputs": [{**GOOD, "name": "x"}]}, {}, 400, "the model's input is called input, found x"),
        (INFER, {"inputs": [{**GOOD, "data": [1, 2]}]}, {}, 400, "needs 3 values, at least one; found 2"),
        (INFER, {"inputs": [{**GOOD, "data": [1, 2, 256]}]}, {}, 400, "no numbers of uint8: [1, 2, 256]"),
        (INFER, {"inputs": [{**GOOD, "data": [1, 2, 2.5]}]}, {}, 400, "no numbers of uint8"),
        (INFER, {"inputs": [{**GOOD, "shape": [1, 3, 1, 1]}]}, {}, 400, "UINT8 [N, H, W, 3]"),
        (INFER, {"inputs": [{**GOOD, "shape": [65, 1, 1, 3]}]}, {}, 400, "expected 1 to 64 images"),
        (INFER, {"inputs": [{**GOOD, "shape": [1, 0, 1, 3]}]}, {}, 400, "needs 0 values, at least one"),
        (
            INFER,
            {"inputs": [{**GOOD, "datatype": "FP32", "shape": [1, 3, 1, 1]}]},
            {},
            400,
            "lie in [0, 1], found 1 to 3",
        ),
        (INFER, {"inputs": [{**GOOD, "datatype": "BYTES", "shape": [1], "data": ["?"]}]}, {}, 400, "base64"),
        (INFER, {"inputs": [GOOD], "outputs": [{"name": "x"}]}, {}, 400, "no output x; there are pred_score"),
        (INFER, b"{}", {"Inference_Header_Content_Length": "9"}, 400, "but the request has 2 bytes"),
        ("/v1/score", b"no image", {}, 400, "The image can't be read as an image"),
        ("/v1/score", b"", {}, 400, "the file is empty"),
        ("/v1/score", b"x", {"Content_Encoding": "gzip"}, 415, "compressed"),
        ("/v1/score", bytes(1_000_001), {}, 413, "1000000 bytes (--largest)"),
        ("/v1/score", bomb(), {}, 413, "found 80000000"),
    ],
)
def test_errors_are_sentences_in_json(served, path, body, headers, code, said):
    found, answer = served.ask(path, body, **headers)
    assert (found, list(answer)) == (code, ["error"])
    assert said in answer["error"]


def test_many_at_once_get_their_own_answers_and_too_many_are_told_so(served, tmp_path, monkeypatch):
    contents = [save(tmp_path / f"{level}.png", grey(level)).read_bytes() for level in range(40, 240, 20)]
    alone = [served.ask("/v1/score", one)[1]["score"] for one in contents]
    found = [None] * len(contents)

    def ask(i):
        found[i] = served.ask("/v1/score", contents[i])

    def all_at_once():
        threads = [threading.Thread(target=ask, args=[i]) for i in range(len(contents))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    all_at_once()
    assert [answer["score"] for _, answer in found] == alone
    monkeypatch.setattr("anomalib_metarefine.deploy.server._MOST_REQUESTS", 2)
    slow = served.detector.submit
    monkeypatch.setattr(served.detector, "submit", lambda *asked: time.sleep(0.2) or slow(*asked))
    all_at_once()
    assert sorted(code for code, _ in found) == [200] * 2 + [503] * 8
    monkeypatch.undo()
    assert served.ask("/v1/score", contents[0])[1]["score"] == alone[0]


def test_the_command_serves_until_sigterm(brightness, tmp_path):
    command = [sys.executable, "-m", "anomalib_metarefine.cli", "serve", str(brightness), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[-1]
    image = save(tmp_path / "a.png", grey(200)).read_bytes()
    with urlopen(Request(address, image), timeout=30) as answer:
        assert json.load(answer)["decision"] == "anomalous"
    assert address.startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "")


def test_others_are_let_in_with_a_warning_only(brightness, monkeypatch, capsys):
    monkeypatch.setattr("anomalib_metarefine.deploy.server.serve", lambda *_: None)
    assert main(["serve", str(brightness), "--host", "0.0.0.0"]) == 0
    assert "everybody who can reach 0.0.0.0 can ask" in capsys.readouterr().err
    assert main(["serve", str(brightness)]) == 0
    assert not capsys.readouterr().err
    assert main(["serve", str(brightness), "--name", "a/b"]) == 2
