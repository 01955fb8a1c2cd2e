"""Who gets results in the tests: a web server, and a real MQTT broker with a subscriber."""

import getpass
import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


class WebServer:
    """Keeps what is posted to it; can go away and come back on its port.

    Attributes:
        got: Every line of every array, in their order.
        answers: Codes to answer with, first one first; then 200.
    """

    def __init__(self):
        self.port, self.got, self.headers, self.answers, self.server = free_port(), [], [], [], None
        self.url = f"http://127.0.0.1:{self.port}/results?key=secret"

    def start(self):
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code = receiver.answers.pop(0) if receiver.answers else 200
                receiver.headers.append(dict(self.headers))
                if code == 200:
                    receiver.got += body
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    def stop(self):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


class Broker:
    """mosquitto, and a subscriber with a session that the broker keeps while either is away."""

    def __init__(self, folder, settings="allow_anonymous true"):
        pytest.importorskip("paho.mqtt.client", reason="the extra mqtt is not installed")
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            pytest.skip("mosquitto is not installed")
        folder.mkdir(parents=True)
        self.port, self.got, self.process, self.subscriber = free_port(), [], None, None
        self.address = f"127.0.0.1:{self.port}/line7/results"
        text = f"listener {self.port} 127.0.0.1\npersistence true\npersistence_location {folder}/\n{settings}\n"
        text += f"max_queued_messages 0\nuser {getpass.getuser()}\n"  # root's would become one who can't write here
        (folder / "mosquitto.conf").write_text(text)
        self.command = [program, "-c", str(folder / "mosquitto.conf")]

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers():
            assert self.process.poll() is None, "mosquitto has ended"
            with socket.socket() as asked:
                return asked.connect_ex(("127.0.0.1", self.port)) == 0

        until(answers)

    def subscribe(self):
        from paho.mqtt.client import CallbackAPIVersion, Client

        subscribed = threading.Event()
        client = Client(CallbackAPIVersion.VERSION2, client_id="receiver", clean_session=False)
        client.reconnect_delay_set(1, 1)
        client.on_connect = lambda client, *_: client.subscribe("line7/#", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _client, _data, message: self.got.append(json.loads(message.payload))
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        assert subscribed.wait(10)
        self.subscriber = client

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def end(self):
        if self.subscriber:
            self.subscriber.loop_stop()
        self.stop()
