"""Receivers of results: a webhook, an MQTT broker. Each raises if it has not got everything."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

if TYPE_CHECKING:
    from paho.mqtt.client import Client

_PATIENCE_S = 10.0  # for an answer
_AUTHORIZATION = "METAREFINE_WEBHOOK_AUTHORIZATION"
_USER, _PASSWORD, _TLS = "METAREFINE_MQTT_USER", "METAREFINE_MQTT_PASSWORD", "METAREFINE_MQTT_TLS"


class _NoRedirect(HTTPRedirectHandler):
    """A redirected POST would become a GET without content, and be taken for success."""

    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401
        return None


class Webhook:
    """Posts JSON arrays of at most 100 lines; an answer of 2xx means that they have arrived.

    The header ``Authorization`` is taken from the environment variable ``METAREFINE_WEBHOOK_AUTHORIZATION``.

    Args:
        url (str): ``http://`` or ``https://``.

    Raises:
        ValueError: If it is anything else, or holds a password.
    """

    name = "webhook"

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            msg = f"--webhook takes http://HOST/PATH or https://HOST/PATH, found {url}. "
            raise ValueError(msg + f"What proves who you are goes into the environment variable {_AUTHORIZATION}.")
        self.target = f"The webhook at {parts.netloc}"  # the rest may hold a secret
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if authorization := os.environ.get(_AUTHORIZATION):
            self._headers["Authorization"] = authorization
        self._opener = build_opener(_NoRedirect)

    def send(self, lines: list[bytes]) -> None:
        """Post lines; raises OSError."""
        body = b"[" + b",".join(line.rstrip(b"\n") for line in lines) + b"]"
        with self._opener.open(Request(self._url, body, self._headers), timeout=_PATIENCE_S) as answer:
            answer.read(1 << 16)

    def close(self) -> None:
        """Nothing to do: there is a connection per message."""


class Mqtt:
    """Publishes each line as a message with quality of service 1: the broker says that it has it.

    User, password and TLS come from the environment: ``METAREFINE_MQTT_USER``, ``METAREFINE_MQTT_PASSWORD``, and
    ``METAREFINE_MQTT_TLS``, which is a file of certificates to trust, or ``1`` for those of the system.

    Args:
        address (str): ``HOST:PORT/TOPIC``.

    Raises:
        ValueError: If it is anything else.
        ModuleNotFoundError: If paho-mqtt is not installed.
    """

    name = "mqtt"

    def __init__(self, address: str) -> None:
        found = re.fullmatch(r"(?P<host>\[[^\]]+\]|[^/:]+):(?P<port>\d{1,5})/(?P<topic>[^+#\0]+)", address)
        if not found or not 0 < int(found["port"]) < 1 << 16:
            msg = f"--mqtt takes HOST:PORT/TOPIC, with a topic without + and #, found {address}. Example: "
            raise ValueError(msg + "localhost:1883/line7/results.")
        if importlib.util.find_spec("paho") is None:
            msg = "--mqtt needs the package paho-mqtt: pip install paho-mqtt."
            raise ModuleNotFoundError(msg)
        self._host, self._port, self._topic = found["host"].strip("[]"), int(found["port"]), found["topic"]
        self.target = f"The MQTT broker {found['host']}:{self._port}"
        self._client: Client | None = None

    def send(self, lines: list[bytes]) -> None:
        """Publish lines; raises OSError, RuntimeError or ValueError."""
        try:
            client = self._client = self._client or self._connected()
            end = time.monotonic() + _PATIENCE_S
            messages = [client.publish(self._topic, line.rstrip(b"\n"), qos=1) for line in lines]
            for message in messages:
                message.wait_for_publish(max(0.0, end - time.monotonic()))
            if not all(message.is_published() for message in messages):
                msg = f"it did not confirm {len(lines)} messages within {_PATIENCE_S:.0f} s"
                raise TimeoutError(msg)
        except BaseException:
            self.close()  # with it go the messages that it would send again by itself
            raise

    def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client.loop_stop()

    def _connected(self) -> Client:
        from paho.mqtt.client import CallbackAPIVersion, Client

        answered, answers = threading.Event(), []

        def on_connect(_client: Client, _data: object, _flags: object, reason: Any, _properties: object) -> None:  # noqa: ANN401
            answers.append(reason)
            answered.set()

        client = Client(CallbackAPIVersion.VERSION2)
        client.on_connect = on_connect
        client.connect_timeout = _PATIENCE_S
        if user := os.environ.get(_USER):
            client.username_pw_set(user, os.environ.get(_PASSWORD))
        if trusted := os.environ.get(_TLS):
            client.tls_set(None if trusted == "1" else trusted)
        client.connect(self._host, self._port)
        client.loop_start()
        if not answered.wait(_PATIENCE_S) or answers[0].is_failure:
            client.disconnect()
            client.loop_stop()
            msg = f"it refuses the connection: {answers[0]}" if answers else "it does not answer"
            raise ConnectionError(msg)
        return client
