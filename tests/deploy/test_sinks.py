"""Results at receivers that go away and come back: at least once each, by their ids."""

import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from urllib.request import urlopen

import numpy as np
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy import sender as sending
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.deploy.sinks import Mqtt, Webhook
from anomalib_metarefine.deploy.watch import WatchSettings, watch
from tests.deploy.conftest import grey, save
from tests.deploy.receivers import Broker, WebServer, free_port, until
from tests.deploy.test_watch import QUICK, Process, events, fill, images, line_count, memory, once


@pytest.fixture
def web():
    server = WebServer()
    yield server
    server.stop()


@pytest.fixture
def broker(tmp_path):
    found = Broker(tmp_path / "broker")
    yield found
    found.end()


def ids(lines):
    return [line["id"] for line in lines]


def with_id(out):
    return [line for line in map(json.loads, out.read_text().splitlines()) if "id" in line]


def survive(model, folder, count, web, broker):
    """Both receivers away at first, `kill -9`, both away again; the memory of the second process in MB, by stage."""
    source, out = folder / "in", folder / "r.jsonl"
    source.mkdir()
    content = save(folder / "one.png", grey(100)).read_bytes()

    def feed(start, stop):
        for i in range(round(start * count), round(stop * count)):
            part = source / f".{i:05d}"
            part.write_bytes(content + b"%d" % i)  # what follows the image's end is not read
            part.rename(source / f"{i:05d}.png")
            time.sleep(0.002)

    threading.Thread(target=feed, args=[0, 0.4], daemon=True).start()
    arguments = [model, source, "--out", out, "--poll", 0.05, "--settle", 0]
    arguments += ["--webhook", web.url, "--mqtt", broker.address]
    with Process(*arguments) as process:
        process.wait_until(lambda: line_count(out) > 0.2 * count, 600)
        assert not web.got
        web.start()
        broker.start()
        broker.subscribe()
        process.wait_until(lambda: web.got and broker.got and line_count(out) > 0.3 * count, 600)
        process.popen.kill()
    with Process(*arguments) as process:
        process.wait_until(lambda: len(events(out, "start")) == 2)
        process.wait_until(lambda: len(web.got) > 0.35 * count and len(broker.got) > 0.35 * count, 600)
        used = [memory(process.popen.pid)]
        web.stop()
        broker.stop()
        feed(0.4, 1)
        process.wait_until(lambda: len(images(out)) == count, 600)
        used.append(memory(process.popen.pid))
        web.start()
        broker.start()
        process.wait_until(lambda: {*ids(with_id(out))} <= {*ids(web.got)} & {*ids(broker.got)}, 600)
        used.append(memory(process.popen.pid))
        code, told = process.stop()
    assert code == 0, told
    assert "has not got" not in told
    return out, used, told


def check(out, count, got):
    """Every line once in the file, and as it is there at a receiver; how many came there more than once."""
    lines = with_id(out)
    assert len({line["path"] for line in images(out)}) == len(images(out)) == count
    assert len(set(ids(lines))) == len(lines)
    received = {line["id"]: line for line in got}
    assert received == {line["id"]: line for line in lines}
    return len(got) - len(received)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_all_arrives_though_receivers_go_away_and_watch_is_killed(brightness, tmp_path, web, broker, count):
    """`pytest -m slow -k receivers_go_away -s` prints memory and repeats for 10,000 images."""
    out, used, told = survive(brightness, tmp_path, count, web, broker)
    repeats = check(out, count, web.got), check(out, count, broker.got)
    print("memory in MB: up, away, all sent", np.round(used, 1), "repeats: webhook, MQTT", repeats)
    print(told)
    assert max(repeats) <= 300  # three interruptions, each of a batch
    assert told.count("takes nothing") <= 2  # once a change, not once a try
    assert used[-1] - used[0] < 30


def test_a_receiver_that_hangs_holds_nothing_up(brightness, tmp_path, monkeypatch, capsys):
    class Hanging:
        name, target = "hanging", "The one that hangs"

        def send(self, lines):
            threading.Event().wait()

        def close(self):
            pass

    monkeypatch.setattr(sending, "_FAREWELL_S", 0.1)
    source = fill(tmp_path / "in", [100] * 30)
    once(brightness, source, tmp_path / "r.jsonl", sinks=[Hanging()], drift=None)
    assert len(images(tmp_path / "r.jsonl")) == 30
    assert "The one that hangs has not got everything. Lines that the next start will send: 31." in told(capsys)


def told(capsys):
    return capsys.readouterr().err


def test_what_is_left_is_sent_at_the_next_start(brightness, tmp_path, capsys, web):
    source, out = fill(tmp_path / "in", [100, 200]), tmp_path / "r.jsonl"
    once(brightness, source, out, sinks=[Webhook(web.url)], drift=None)
    said = told(capsys)
    assert f"Warning: The webhook at 127.0.0.1:{web.port} takes nothing: " in said
    assert "Connection refused" in said
    assert "secret" not in said
    assert "the next start will send: 3." in said
    web.start()
    once(brightness, source, out, sinks=[Webhook(web.url)], drift=None)
    assert web.got == with_id(out)
    assert [line["decision"] for line in web.got if "path" in line] == ["normal", "anomalous"]
    assert "takes nothing" not in told(capsys)
    once(brightness, source, out, sinks=[Webhook(web.url)], drift=None)
    assert len(web.got) == len(with_id(out))  # nothing but the third start comes again


def test_an_image_has_the_same_id_when_its_line_was_lost(brightness, tmp_path):
    source = fill(tmp_path / "in", [100, 200])
    for name in ("a", "b"):
        once(brightness, source, tmp_path / f"{name}.jsonl")
    first, second = (images(tmp_path / f"{name}.jsonl") for name in ("a", "b"))
    assert ids(first) == ids(second)
    assert len(set(ids(first))) == 2
    assert not {*ids(events(tmp_path / "a.jsonl", "start"))} & {*ids(events(tmp_path / "b.jsonl", "start"))}


class TestWebhook:
    @pytest.mark.parametrize("code", [302, 400, 503])
    def test_another_answer_than_2xx_is_no_arrival(self, web, code):
        web.answers = [code]
        web.start()
        sink = Webhook(web.url)
        with pytest.raises(OSError, match=str(code)):
            sink.send([b'{"id": "1"}\n'])
        assert not web.got
        sink.send([b'{"id": "1"}\n', b'{"id": "2"}\n'])
        assert web.got == [{"id": "1"}, {"id": "2"}]

    def test_says_who_it_is(self, web, monkeypatch):
        monkeypatch.setenv("METAREFINE_WEBHOOK_AUTHORIZATION", "Bearer abc")
        web.start()
        Webhook(web.url).send([b"{}\n"])
        assert web.headers[0]["Authorization"] == "Bearer abc"

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "host/path", "http://", "http://me:secret@host/"])
    def test_refuses_other_addresses(self, url):
        with pytest.raises(ValueError, match="--webhook takes http://HOST/PATH"):
            Webhook(url)


class TestMqtt:
    def test_a_broker_that_restarts_between_two_lines(self, broker):
        broker.start()
        broker.subscribe()
        sink = Mqtt(broker.address)
        sink.send([b'{"id": "1"}\n'])
        broker.stop()
        with pytest.raises((OSError, RuntimeError)):
            sink.send([b'{"id": "2"}\n'])
        broker.start()
        sink.send([b'{"id": "2"}\n'])
        until(lambda: {*ids(broker.got)} == {"1", "2"})
        sink.close()

    def test_user_password_and_tls(self, tmp_path, monkeypatch):
        if not shutil.which("mosquitto_passwd") or not shutil.which("openssl"):
            pytest.skip("needs mosquitto_passwd and openssl")
        key, certificate, users = (tmp_path / name for name in ("key.pem", "certificate.pem", "users"))
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["mosquitto_passwd", "-b", "-c", users, "line7", "right"], check=True, capture_output=True)
        settings = f"allow_anonymous false\npassword_file {users}\ncertfile {certificate}\nkeyfile {key}"
        broker = Broker(tmp_path / "broker", settings)
        broker.start()
        monkeypatch.setenv("METAREFINE_MQTT_TLS", str(certificate))
        monkeypatch.setenv("METAREFINE_MQTT_USER", "line7")
        monkeypatch.setenv("METAREFINE_MQTT_PASSWORD", "wrong")
        sink = Mqtt(broker.address)
        with pytest.raises(ConnectionError, match="refuses the connection: Not authorized"):
            sink.send([b"{}\n"])
        monkeypatch.setenv("METAREFINE_MQTT_PASSWORD", "right")
        sink.send([b"{}\n"])
        sink.close()
        monkeypatch.setenv("METAREFINE_MQTT_TLS", "1")  # the system does not know this certificate
        with pytest.raises(OSError, match="certificate verify failed"):
            sink.send([b"{}\n"])
        broker.end()

    @pytest.mark.parametrize("address", ["host", "host:1883", "host:1883/", "host:99999/a", "host:1883/a/#", ":1883/a"])
    def test_refuses_other_addresses(self, address):
        with pytest.raises(ValueError, match="--mqtt takes HOST:PORT/TOPIC"):
            Mqtt(address)


class TestMetrics:
    def test_are_scraped_by_prometheus(self, brightness, tmp_path):
        pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("prometheus is not installed")
        source, port, own = fill(tmp_path / "in", [100, 100, 200]), free_port(), free_port()
        (source / "bad.png").write_bytes(b"bad")
        scrape = {"job_name": "line7", "scrape_interval": "200ms"}
        scrape |= {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
        command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += [f"--web.listen-address=127.0.0.1:{own}"]
        arguments = [brightness, source, "--out", tmp_path / "r.jsonl", "--metrics", port, "--patience", 0]
        arguments += ["--webhook", f"http://127.0.0.1:{free_port()}/"]

        def value(query):
            try:
                with urlopen(f"http://127.0.0.1:{own}/api/v1/query?query={query}") as answer:
                    result = json.load(answer)["data"]["result"]
            except OSError:
                return None
            return float(result[0]["value"][1]) if result else None

        prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with Process(*arguments) as process:
                process.wait_until(lambda: value("sum(metarefine_images_total)") == 4)
                process.wait_until(lambda: value("metarefine_sink_up") == 0)
                found = {
                    name: value(f'metarefine_images_total{{decision="{name}"}}') for name in ("normal", "unreadable")
                }
                assert found == {"normal": 2, "unreadable": 1}
                assert value("metarefine_threshold") == 10
                assert value("metarefine_score_sum") == pytest.approx(400 / 255, abs=1e-3)
                assert value("process_resident_memory_bytes") > 1e6
        finally:
            prometheus.terminate()
            prometheus.wait()

    def test_a_port_that_is_taken(self, brightness, tmp_path, capsys, web):
        pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
        web.start()
        arguments = ["watch", str(brightness), str(tmp_path), "--out", str(tmp_path / "r.jsonl"), "--once"]
        assert main([*arguments, "--metrics", str(web.port)]) == 2
        assert f"Port {web.port} for --metrics can't be had" in told(capsys)


def test_standard_output_is_no_outbox(brightness, tmp_path, capsys):
    assert main(["watch", str(brightness), str(tmp_path), "--out", "-", "--webhook", "http://host/"]) == 2
    assert "pass one as --out" in told(capsys)


def test_results_that_are_rotated_while_the_receiver_is_away(brightness, tmp_path, web):
    source, out = fill(tmp_path / "in", [100] * 5), tmp_path / "r.jsonl"
    arguments = [brightness, source, "--out", out, "--poll", 0.05, "--webhook", web.url]
    with Process(*arguments) as process:
        for rotation in (1, 2):
            process.wait_until(lambda: out.exists() and len(images(out)) == 5)
            out.rename(tmp_path / f"r.jsonl.{rotation}")
            process.wait_until(lambda: line_count(out) >= 3)
            fill(source, [100] * 5, start=5 * rotation)
        process.wait_until(lambda: len(images(out)) == 5)
        process.popen.kill()
    web.start()
    summary = watch(Detector(brightness), source, out, WatchSettings(True, rules=QUICK, sinks=[Webhook(web.url)]))
    assert not summary.decisions
    every = [line for file in (tmp_path / "r.jsonl.1", tmp_path / "r.jsonl.2", out) for line in with_id(file)]
    assert web.got == every
    assert Counter("path" in line for line in every)[True] == 15
