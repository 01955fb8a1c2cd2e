import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.arrivals import Rules
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.deploy.monitor import Monitor
from anomalib_metarefine.deploy.sidecar import read_sidecar, write_sidecar
from anomalib_metarefine.deploy.watch import WatchSettings, watch
from anomalib_metarefine.images.reading import read_image
from tests.deploy.conftest import brightness_model, grey, save

QUICK = Rules(settle=0.0, patience=0.0)
SETTINGS = {"window": 500, "false_alarm_rate": 0.01, "horizon": 10_000, "defect_rate": 0.05}  # of the command line


def fill(folder, levels, start=0):
    """An image per brightness; older ones first."""
    for i, level in enumerate(levels, start):
        path = save(folder / f"{i:05d}.png", grey(level, seed=i))
        os.utime(path, (1e9 + i, 1e9 + i))
    return folder


def read(out):
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def images(out):
    return [record for record in read(out) if "path" in record]


def events(out, *kinds):
    return [record for record in read(out) if record.get("event") in kinds]


def once(model, source, out, **settings):
    return watch(Detector(model), source, out, WatchSettings(once=True, **({"rules": QUICK} | settings)))


class Process:
    """A `metarefine watch` of its own."""

    def __init__(self, *arguments, stdin=None):
        command = [sys.executable, "-m", "anomalib_metarefine.cli", "watch", *map(str, arguments)]
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.communicate()

    def wait_until(self, happened, seconds=60):
        end = time.monotonic() + seconds
        while not happened():
            assert self.popen.poll() is None, self.popen.communicate()[1]
            assert time.monotonic() < end, "it took too long"
            time.sleep(0.02)

    def stop(self, number=signal.SIGTERM):
        self.popen.send_signal(number)
        _, told = self.popen.communicate(timeout=60)
        return self.popen.returncode, told


def line_count(out):
    return out.read_bytes().count(b"\n") if out.exists() else 0


class TestLines:
    def test_say_all(self, brightness, tmp_path):
        source = fill(tmp_path / "in", [100, 128, 200])
        summary = once(brightness, source, tmp_path / "r.jsonl")
        assert dict(summary.decisions) == {"normal": 1, "uncertain": 1, "anomalous": 1}
        first = images(tmp_path / "r.jsonl")[0]
        file = source / "00000.png"
        assert first["path"] == str(file)
        assert (first["size"], first["mtime_ns"]) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert first["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert first["score"] == pytest.approx(100 / 255, abs=1e-3)
        assert first["raw_score"] == pytest.approx(20 * first["score"])
        assert (first["threshold"], first["decision"], first["drift"]) == (10.0, "normal", False)
        assert first["latency_ms"] > 0
        assert first["time"].endswith("Z")

    def test_are_in_the_order_of_arrival(self, brightness, tmp_path):
        source = fill(tmp_path / "in", [100] * 30)
        os.utime(source / "00007.png", (2e9 - 1e9, 1e9 - 5))
        once(brightness, source, tmp_path / "r.jsonl")
        names = [Path(record["path"]).name for record in images(tmp_path / "r.jsonl")]
        assert names == ["00007.png", *(f"{i:05d}.png" for i in range(30) if i != 7)]

    def test_without_a_sidecar(self, tmp_path):
        model = brightness_model(tmp_path / "plain", sidecar=False)
        once(model, fill(tmp_path / "in", [100, 200]), tmp_path / "r.jsonl")
        found = [
            [record[key] for key in ("decision", "raw_score", "threshold", "drift")]
            for record in images(tmp_path / "r.jsonl")
        ]
        assert found == [["normal", None, None, None], ["anomalous", None, None, None]]

    def test_of_files_that_can_not_be_read(self, brightness, tmp_path):
        source = fill(tmp_path / "in", [100, 100, 100])
        (source / "00001.png").write_bytes((source / "00000.png").read_bytes()[:300])
        (source / "empty.PNG").touch()
        save(source / ".hidden.png", grey(100))
        (source / "notes.txt").write_text("no image")
        (source / "folder.png").mkdir()
        (source / "broken.png").symlink_to(source / "nowhere.png")
        summary = once(brightness, source, tmp_path / "r.jsonl")
        assert dict(summary.decisions) == {"normal": 2, "unreadable": 2}
        errors = {Path(record["path"]).name: record for record in images(tmp_path / "r.jsonl") if "error" in record}
        assert sorted(errors) == ["00001.png", "empty.PNG"]
        assert "can't be read as an image" in errors["00001.png"]["error"]
        assert errors["empty.PNG"]["error"].endswith("the file is empty")
        assert errors["empty.PNG"]["decision"] is None

    def test_of_an_image_that_the_model_does_not_take(self, tmp_path):
        model = brightness_model(tmp_path / "fixed", accepts=[24, 32])
        source = fill(tmp_path / "in", [100])
        save(source / "wide.png", grey(100, size=(24, 64)))
        begin = time.monotonic()
        once(model, source, tmp_path / "r.jsonl", rules=Rules(settle=0))
        assert time.monotonic() - begin < 5  # patience would not help
        error = next(record["error"] for record in images(tmp_path / "r.jsonl") if "error" in record)
        assert "takes images of 24 x 32 pixels, found 24 x 64" in error

    def test_to_standard_output(self, brightness, tmp_path):
        source = fill(tmp_path / "in", [100] * 3)
        with Process(brightness, source, "--out", "-", "--once") as process:
            said, told = process.popen.communicate(timeout=60)
        assert [json.loads(line).get("decision") for line in said.splitlines()][1:4] == ["normal"] * 3
        assert "3 images in" in told


class TestAgain:
    def test_no_image_twice(self, brightness, tmp_path):
        source = fill(tmp_path / "in" / "monday", [100] * 5)
        (source / "00002.png").write_bytes(b"broken")
        out = tmp_path / "r.jsonl"
        once(brightness, source.parent, out)
        fill(tmp_path / "in" / "tuesday", [100] * 2)
        assert once(brightness, source.parent, out).before == 5
        assert Counter(record["path"] for record in images(out)).most_common(1)[0][1] == 1
        assert len(images(out)) == 7

    def test_a_rewritten_file_is_another_image(self, brightness, tmp_path):
        source, out = fill(tmp_path / "in", [100] * 3), tmp_path / "r.jsonl"
        once(brightness, source, out)
        save(source / "00001.png", grey(200))
        assert once(brightness, source, out).decisions == {"anomalous": 1}
        assert len(images(out)) == 4

    def test_line_by_line_after_any_break(self, brightness, tmp_path):
        """Whatever was written when it broke off: each image once, and the monitor as if nothing had happened."""
        source, out = fill(tmp_path / "in", [100] * 20 + [140] * 40), tmp_path / "whole.jsonl"
        once(brightness, source, out, drift={"window": 20})
        whole = out.read_bytes()
        assert [event["drifted"] for event in events(out, "drift")] == [True]
        for cut in np.linspace(0, len(whole), 12).astype(int):
            broken = tmp_path / f"{cut}.jsonl"
            broken.write_bytes(whole[:cut])
            once(brightness, source, broken, drift={"window": 20})
            assert sorted(record["path"] for record in images(broken)) == sorted(map(str, source.iterdir()))
            assert facts(events(broken, "drift")) == facts(events(out, "drift"))
            assert [record["drift"] for record in images(broken)] == [record["drift"] for record in images(out)]

    def test_another_model_starts_afresh(self, brightness, tmp_path):
        source, out = fill(tmp_path / "in", [140] * 60), tmp_path / "r.jsonl"
        once(brightness, source, out)
        other = brightness_model(tmp_path / "other", quantiles=np.linspace(10, 12, 101), band=(13, 14))
        once(other, fill(source, [140], start=60), out)
        assert [record["drift"] for record in images(out)][-2:] == [True, False]

    def test_a_saved_state_that_can_not_be_used(self, brightness, tmp_path, capsys):
        source, out = fill(tmp_path / "in", [140] * 60), tmp_path / "r.jsonl"
        once(brightness, source, out)
        out.write_text(out.read_text().replace('"wealth"', '"health"'))
        once(brightness, fill(source, [140], start=60), out)
        assert "the monitor starts afresh" in capsys.readouterr().err
        assert images(out)[-1]["drift"] is False

    @pytest.mark.parametrize("odd", ['{"path": "/x"}', '{"path": ["x"], "size": 1, "mtime_ns": 1}'])
    def test_an_odd_line_does_not_stop_a_start(self, brightness, tmp_path, capsys, odd):
        source, out = fill(tmp_path / "in", [100] * 2), tmp_path / "r.jsonl"
        once(brightness, source, out)
        with out.open("a") as lines:
            lines.write(odd + "\n")
        assert once(brightness, source, out).before == 2
        assert "1 damaged lines" in capsys.readouterr().err

    def test_only_one_at_a_time(self, brightness, tmp_path, capsys):
        source, out = fill(tmp_path / "in", [100]), tmp_path / "r.jsonl"
        with Process(brightness, source, "--out", out) as process:
            process.wait_until(lambda: line_count(out) >= 2)
            assert main(["watch", str(brightness), str(source), "--out", str(out)]) == 2
            assert f"Another `metarefine watch` writes to {out}" in capsys.readouterr().err
            assert process.stop()[0] == 0


def facts(found):
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


class TestDrift:
    def test_begins_and_ends(self, brightness, tmp_path, capsys):
        levels = np.random.default_rng(0).uniform(76.5, 102, 1500)
        levels[300:400] += 20
        once(brightness, fill(tmp_path / "in", levels), tmp_path / "r.jsonl")
        begun, ended = events(tmp_path / "r.jsonl", "drift")
        assert (begun["drifted"], begun["direction"], ended["drifted"]) == (True, "up", False)
        assert 290 < begun["since"] <= begun["count"] < 360
        drift = [record["drift"] for record in images(tmp_path / "r.jsonl")]
        assert drift.index(True) == begun["count"] - 1
        told = capsys.readouterr().err
        assert f"Warning: scores have drifted up since image {begun['since']}" in told
        assert f"The drift has ended, at image {ended['count']}." in told

    def test_moves_the_threshold_within_limits(self, brightness, tmp_path, capsys):
        levels = np.random.default_rng(0).uniform(76.5, 102, 300)
        levels[100:] += 30
        source, out = fill(tmp_path / "in", levels), tmp_path / "r.jsonl"
        once(brightness, source, out, drift={"window": 100}, dynamic_threshold=(9.0, 12.0))
        moves = events(out, "threshold")
        assert [move["new"] for move in moves][-1] == 12.0
        thresholds = [record["threshold"] for record in images(out)]
        assert thresholds[0] == 10.0
        assert thresholds[moves[0]["count"] - 1 : moves[0]["count"] + 1] == [moves[0]["old"], moves[0]["new"]]
        assert "The threshold moved from 10 to 12" in capsys.readouterr().err
        once(brightness, fill(source, [100], start=300), out, drift={"window": 100}, dynamic_threshold=(9.0, 12.0))
        assert images(out)[-1]["threshold"] == 12.0

    def test_can_be_switched_off(self, brightness, tmp_path):
        once(brightness, fill(tmp_path / "in", [140] * 60), tmp_path / "r.jsonl", drift=None)
        assert {record["drift"] for record in images(tmp_path / "r.jsonl")} == {None}

    def test_is_not_known_without_a_calibration(self, tmp_path, capsys):
        model = brightness_model(tmp_path / "model")
        source = fill(tmp_path / "in", [100])
        once(model, source, tmp_path / "r.jsonl")
        assert "No drift monitor: the model was not calibrated" in capsys.readouterr().err
        with pytest.raises(ValueError, match="needs a model with a calibration"):
            once(model, source, tmp_path / "r2.jsonl", dynamic_threshold=(9, 11))


class TestHeatmaps:
    @pytest.mark.parametrize(
        ("which", "expected"), [("anomalous", ["00001", "00002"]), ("all", ["00000", "00001", "00002"])]
    )
    def test_are_written(self, brightness, tmp_path, which, expected):
        source, maps = fill(tmp_path / "in", [100, 128, 200]), tmp_path / "maps"
        once(brightness, source, tmp_path / "r.jsonl", heatmaps=maps, heatmaps_of=which)
        assert sorted(file.name.split("-")[0] for file in maps.iterdir()) == expected
        for record in images(tmp_path / "r.jsonl"):
            if "heatmap" in record:
                assert np.asarray(Image.open(record["heatmap"])).shape == (24, 32, 3)

    def test_not_among_the_images(self, brightness, tmp_path):
        source = fill(tmp_path / "in", [100])
        with pytest.raises(ValueError, match="they would be taken for images"):
            once(brightness, source, tmp_path / "r.jsonl", heatmaps=source / "maps")

    def test_that_can_not_be_written_cost_no_decision(self, brightness, tmp_path, capsys, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("anomalib_metarefine.deploy.watch.write_overlay", full)
        once(brightness, fill(tmp_path / "in", [200]), tmp_path / "r.jsonl", heatmaps=tmp_path / "maps")
        assert images(tmp_path / "r.jsonl")[0]["decision"] == "anomalous"
        assert "No space left" in capsys.readouterr().err


class TestStandardInput:
    def test_paths_that_come_late_or_never(self, brightness, tmp_path):
        source, out = fill(tmp_path / "in", [100, 150, 100]), tmp_path / "r.jsonl"
        paths = [source / f"{i:05d}.png" for i in (2, 1, 0, 1)] + [source / "late.png", source / "never.png"]
        with Process(brightness, "-", "--out", out, "--patience", 2, stdin=subprocess.PIPE) as process:
            process.popen.stdin.write("\n".join(map(str, paths)))  # no newline at the end
            process.popen.stdin.flush()
            process.popen.stdin.close()
            process.wait_until(lambda: line_count(out) >= 4)
            save(source / "late.png", grey(100))
            process.popen.stdin = None
            assert process.popen.wait(60) == 0
        found = [(Path(record["path"]).name, record["decision"]) for record in images(out)]
        assert found[:3] == [("00002.png", "normal"), ("00001.png", "anomalous"), ("00000.png", "normal")]
        assert sorted(found[3:]) == [("late.png", "normal"), ("never.png", None)]

    def test_stops_while_it_waits(self, brightness, tmp_path):
        out = tmp_path / "r.jsonl"
        with Process(brightness, "-", "--out", out, stdin=subprocess.PIPE) as process:
            process.wait_until(lambda: line_count(out) >= 1)
            process.popen.stdin.write(f"{save(tmp_path / 'a.png', grey(100))}\n")
            process.popen.stdin.flush()
            process.wait_until(lambda: line_count(out) >= 2)
            code, told = process.stop()
        assert code == 0
        assert "1 image in" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop_in_a_burst(brightness, tmp_path, number):
    source, out = fill(tmp_path / "in", [100] * 2000), tmp_path / "r.jsonl"
    with Process(brightness, source, "--out", out) as process:
        process.wait_until(lambda: line_count(out) > 20)
        code, told = process.stop(number)
    assert code == 0
    done = len(images(out))
    assert f"{done} images in" in told
    assert read(out)[-1]["event"] == "state"
    once(brightness, source, out)
    assert len(images(out)) == len({record["path"] for record in images(out)}) == 2000


def test_a_full_disk_ends_it_and_costs_nothing(brightness, tmp_path):
    resource = pytest.importorskip("resource")
    source, out = fill(tmp_path / "in", [100] * 60), tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "anomalib_metarefine.cli", "watch", brightness, source, "--out", out]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    once(brightness, source, out)
    assert sorted(record["path"] for record in images(out)) == sorted(map(str, source.iterdir()))


class Feeder(threading.Thread):
    """Writes images as a line does; every 40th in two parts with a pause, every 100th is cut off for good."""

    def __init__(self, contents, folder, count, pause):
        super().__init__(daemon=True)
        self.contents, self.folder, self.count, self.pause = contents, folder, count, pause
        self.corrupt = {self.name_of(i) for i in range(50, count, 100)}

    def name_of(self, i):
        return str(self.folder / f"{i:05d}.png")

    def run(self):
        for i in range(self.count):
            content = self.contents[i % len(self.contents)] + b"%d" % i  # what follows the image's end is not read
            with Path(self.name_of(i)).open("wb") as file:
                if i % 100 == 50:
                    file.write(content[: len(content) // 2])
                    continue
                if i % 40 == 7:
                    file.write(content[: len(content) // 2])
                    file.flush()
                    time.sleep(0.5)
                    content = content[len(content) // 2 :]
                file.write(content)
            time.sleep(self.pause)


def memory(pid):
    """Resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def survive(model, contents, folder, count, pause):
    """Feed images to a watch, kill it half way, start it again, and compare what was reported with what was fed.

    Returns:
        The resident memory of the second process in MB, over its time.
    """
    source, out = folder / "in", folder / "r.jsonl"
    source.mkdir()
    feeder = Feeder(contents, source, count, pause)
    arguments = [model, source, "--out", out, "--patience", 3, "--poll", 0.1]
    feeder.start()
    with Process(*arguments) as process:
        process.wait_until(lambda: line_count(out) > 0.4 * count, 1800)
        process.popen.kill()
    with out.open("ab") as file:
        file.write(b'{"path": "torn')
    used = []
    with Process(*arguments) as process:

        def finished():
            used.append(memory(process.popen.pid))
            time.sleep(0.2)
            return out.read_bytes().count(b'"mtime_ns"') >= count

        process.wait_until(finished, 3600)
        time.sleep(0.5)  # nothing more may come
        code, told = process.stop()
    assert code == 0
    assert "A torn last line" in told
    fed = [feeder.name_of(i) for i in range(count)]
    assert Counter(record["path"] for record in images(out)) == Counter(fed)
    assert {record["path"] for record in images(out) if "error" in record} == feeder.corrupt
    assert len(events(out, "start")) == 2
    return out, used


def uninterrupted(model, out):
    """The monitor that saw all scores without a break."""
    monitor = Monitor(Detector(model), SETTINGS)
    for record in images(out):
        monitor.update(record.get("raw_score"))
    return monitor


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_none_twice_none_lost_after_kill_9(brightness, tmp_path):
    contents = []
    for seed, level in enumerate(np.random.default_rng(0).uniform(76.5, 102, 50)):
        contents.append(io.BytesIO())
        Image.fromarray(grey(level, seed=seed)).save(contents[-1], format="PNG")
    out, _ = survive(brightness, [content.getvalue() for content in contents], tmp_path, 400, 0.005)
    assert events(out, "state")[-1]["monitor"] == uninterrupted(brightness, out).to_dict()


def calibrated(model, folder):
    """A copy of a model that knows the scores of 300 good solar cells."""
    cells = make_elpv_samples(packaged_root(), "mono")
    detector = Detector(model)
    answers = [detector.predict(read_image(path).pixels) for path in cells.image_path[cells.label_index == 0][:300]]
    quantiles = np.quantile([answer.raw_score for answer in answers], np.linspace(0, 1, 101)).tolist()
    shutil.copytree(model, folder)
    sidecar = read_sidecar(folder)
    sidecar.calibration = {"quantiles": quantiles, "images": 300, "set_aside": 0}
    write_sidecar(folder, sidecar)
    return folder


@pytest.mark.slow
def test_ten_thousand_real_images(trained, tmp_path):
    """`pytest -m slow -k ten_thousand -s` prints the memory over time."""
    model = calibrated(trained.folder, tmp_path / "model")
    contents = [path.read_bytes() for path in sorted((packaged_root() / "images").glob("*.png"))]
    begin = time.monotonic()
    out, used = survive(model, contents, tmp_path, 10_000, 0.0)
    quarter = len(used) // 4
    settled, end = np.median(used[quarter : 2 * quarter]), np.median(used[-quarter:])
    ms = np.percentile([record["latency_ms"] for record in images(out) if "latency_ms" in record], [50, 95, 99])
    print(f"{time.monotonic() - begin:.0f} s; memory in MB:", np.round(used[:: max(1, len(used) // 20)]).tolist())
    print("second quarter", settled, "last quarter", end, "latency ms p50 p95 p99", ms.round(1).tolist())
    print(len(events(out, "drift")), "drift events,", Counter(record["decision"] for record in images(out)))
    assert end - settled < 8
    assert events(out, "state")[-1]["monitor"] == uninterrupted(model, out).to_dict()


class TestRefuses:
    def test_more_images_than_it_remembers(self, brightness, tmp_path):
        with pytest.raises(ValueError, match="holds 5 images, more than are remembered"):
            once(brightness, fill(tmp_path / "in", [100] * 5), tmp_path / "r.jsonl", remember=4)

    def test_no_folder(self, brightness, tmp_path, capsys):
        assert main(["watch", str(brightness), str(tmp_path / "none"), "--out", str(tmp_path / "r.jsonl")]) == 2
        assert "There is no folder" in capsys.readouterr().err

    def test_times_below_zero(self, brightness, tmp_path):
        with pytest.raises(ValueError, match="settle must be at least 0 seconds, found -1"):
            once(brightness, tmp_path, tmp_path / "r.jsonl", rules=Rules(settle=-1))


def rename(out):
    out.rename(out.with_name("old.jsonl"))


def rename_and_create(out):
    rename(out)
    out.touch()


def copy_and_empty(out):
    shutil.copy(out, out.with_name("old.jsonl"))
    with out.open("r+b") as file:
        file.truncate(0)


class TestResultsThatAreTouched:
    @pytest.mark.parametrize("rotate", [rename, rename_and_create, copy_and_empty])
    def test_rotated_ones_are_begun_anew_and_nothing_is_lost_or_done_twice(self, brightness, tmp_path, capsys, rotate):
        source, out = fill(tmp_path / "in", [100] * 20 + [140] * 30), tmp_path / "r.jsonl"
        with Process(brightness, source, "--out", out, "--poll", "0.05") as process:
            process.wait_until(lambda: line_count(out) >= 51)
            rotate(out)
            process.wait_until(lambda: line_count(out) >= 3)  # also while no image comes
            fill(source, [140] * 10, start=50)
            process.wait_until(lambda: len(images(out)) >= 10)
            assert "a new one is begun" in process.stop()[1]
        old = tmp_path / "old.jsonl"
        assert (len(images(old)), len(images(out))) == (50, 10)
        assert read(out)[0]["event"] == "start"
        assert once(brightness, fill(source, [140], start=60), out, drift=SETTINGS).decisions == {"anomalous": 1}
        paths = [record["path"] for record in images(old) + images(out)]
        assert sorted(paths) == sorted(map(str, source.iterdir()))
        monitor = Monitor(Detector(brightness), SETTINGS)
        for record in images(old) + images(out):
            monitor.update(record["raw_score"])
        assert events(out, "state")[-1]["monitor"] == monitor.to_dict()

    def test_removed_ones_end_it_with_a_sentence(self, brightness, tmp_path):
        source, out = fill(tmp_path / "in", [100] * 3), tmp_path / "r.jsonl"
        with Process(brightness, source, "--out", out) as process:
            process.wait_until(lambda: line_count(out) >= 4)
            out.unlink()
            _, told = process.popen.communicate(timeout=60)
        assert process.popen.returncode == 1
        assert f"{out} was removed while results were written" in told
        assert "Traceback" not in told
        once(brightness, source, out)
        assert len(images(out)) == 3

    def test_another_file_in_their_place_is_left_alone(self, brightness, tmp_path):
        source, out = fill(tmp_path / "in", [100] * 3), tmp_path / "r.jsonl"
        with Process(brightness, source, "--out", out) as process:
            process.wait_until(lambda: line_count(out) >= 4)
            (tmp_path / "notes").write_text("mine\n")
            (tmp_path / "notes").rename(out)
            _, told = process.popen.communicate(timeout=60)
        assert (process.popen.returncode, out.read_text()) == (2, "mine\n")
        assert "holds something else than results" in told
