"""Curation past one machine: the same manifest wherever it runs, memory, time, and what a kill costs.

    python -m studies.scale executors FOLDER --out scale   # the engines and one pass of the backbone, side by side
    python -m studies.scale memory FOLDER --images 2000 5000 10000 --out scale
    python -m studies.scale kill FOLDER --times 20 --out scale
    python -m studies.scale simulate --images 10000 100000 1000000 --out scale

`simulate` draws features inside the pass, without images and backbone: what is left is everything that grows with the
number of images. Its features are small (16 patches of 32 channels), or the work folder would take 100 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress

from anomalib_metarefine.curation.evidence import gather_evidence
from anomalib_metarefine.features.executors import make_executor
from anomalib_metarefine.features.shards import Shard
from anomalib_metarefine.features.store import SHARD, FeatureStore
from anomalib_metarefine.refinement.engine import refine_images
from anomalib_metarefine.settings import Settings

_GRID, _CHANNELS = (4, 4), 32
_DIRTY = 20  # every so manieth image has a defect
_CURATE = """
import json, resource, sys, time
from pathlib import Path
from anomalib_metarefine.curation.curate import curate
from anomalib_metarefine.features import extract, store
settings = json.loads(sys.argv[1])
extract.SHARD = store.SHARD = settings.pop("shard")
if settings["engine"] == "ray":
    import ray
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
begin = time.perf_counter()
data = [Path(path) for path in Path(settings.pop("list")).read_text().split("\\n")]
curation = curate(data, progress=False, **settings)
seconds = time.perf_counter() - begin
curation.manifest.table.to_csv(sys.argv[2], index=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "peak_gb": peak, **curation.manifest.run["seconds"]}))
"""
_BACKBONE = """
import sys, time
from pathlib import Path
import torch
from torchvision.transforms.v2 import Compose, Normalize, Resize
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone, fitting_size, normalization
from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.features.resize import usual_size
paths = [Path(path) for path in Path(sys.argv[1]).read_text().split("\\n")]
size = fitting_size(OFFLINE_BACKBONE, usual_size(paths))
mean, std = normalization(OFFLINE_BACKBONE)
backbone = Backbone(OFFLINE_BACKBONE)
transform = Compose([Resize(size, antialias=True), Normalize(list(mean), list(std))])
begin = time.perf_counter()
with torch.no_grad():
    for i in range(0, len(paths), 32):
        backbone(torch.stack([transform(image_tensor(path)) for path in paths[i : i + 32]]))
print(time.perf_counter() - begin)
"""


def listed(folder: Path, count: int | None, out: Path) -> Path:
    """A file with the paths of the first so many images."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".bmp"))[:count]
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{len(paths)}.txt"
    file.write_text("\n".join(str(path.absolute()) for path in paths))
    return file


def run(code: str, *arguments: str) -> str:
    """The last line that a fresh Python prints: its memory is its own."""
    found = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip().splitlines()[-1]


def settings_of(images: Path, engine: str, out: Path, **more: object) -> str:
    """What `_CURATE` is told."""
    settings = {"list": str(images), "engine": engine, "work": str(out / f"work-{engine}"), "shard": SHARD, **more}
    return json.dumps({**settings, "workers": None if engine == "local" else 2})


def curated(images: Path, engine: str, out: Path, fresh: bool = True, **more: object) -> dict[str, float]:
    """Time and peak memory of the driver; the manifest is beside."""
    if fresh:
        shutil.rmtree(out / f"work-{engine}", ignore_errors=True)
    return json.loads(run(_CURATE, settings_of(images, engine, out, **more), str(out / f"{images.stem}-{engine}.csv")))


def executors(images: Path, out: Path) -> pd.DataFrame:
    """Each engine beside one pass of the backbone in this process."""
    rows = []
    for engine in ("local", "joblib", "ray"):
        backbone = float(run(_BACKBONE, str(images)))
        rows.append({"engine": engine, "backbone": backbone, **curated(images, engine, out)})
        rows[-1]["ratio"] = rows[-1]["seconds"] / backbone
        rows[-1]["same"] = same(out / f"{images.stem}-local.csv", out / f"{images.stem}-{engine}.csv")
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def same(one: Path, other: Path) -> bool:
    """Whether two manifests hold the same decisions, and the same scores to a ten-thousandth."""
    a, b = pd.read_csv(one), pd.read_csv(other)
    numbers = a.select_dtypes("number").columns
    rest = [name for name in a.columns if name not in numbers]
    return a[rest].equals(b[rest]) and np.allclose(a[numbers], b[numbers], atol=1e-4, equal_nan=True)


def kills(images: Path, times: int, out: Path, seed: int) -> pd.DataFrame:
    """Kill the driver or a worker at a random moment, go on, and look at what was done twice.

    The moments are drawn over the length of an undisturbed run. A shard that was finished must stay as it is. Images
    and shards are small: 16 images of 64 x 64 pixels.
    """
    rng, work, small = random.Random(seed), out / "work-joblib", {"shard": 16, "image_size": (64, 64)}
    begin = time.perf_counter()
    curated(images, "joblib", out, **small)
    length = time.perf_counter() - begin
    expected = out / f"{images.stem}-expected.csv"
    shutil.copy(out / f"{images.stem}-joblib.csv", expected)
    rows = []
    for number in range(times):
        shutil.rmtree(work)
        victim, after = rng.choice(["worker", "driver"]), rng.uniform(length / 4, length)
        manifest = out / f"{images.stem}-joblib.csv"
        manifest.unlink(missing_ok=True)
        command = [sys.executable, "-c", _CURATE, settings_of(images, "joblib", out, **small), str(manifest)]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(after)
        target = running.pid if victim == "driver" else _worker_of(running.pid, rng)
        finished = _finished(work)
        if target and running.poll() is None:
            (os.killpg if victim == "driver" else os.kill)(target, signal.SIGKILL)
        running.wait()
        if not manifest.exists():
            curated(images, "joblib", out, fresh=False, **small)
        kept = all(_finished(work).get(file) == stamp for file, stamp in finished.items())
        row = {"run": number, "killed": victim, "after": after, "shards": len(finished), "kept": kept}
        rows.append({**row, "same": same(expected, manifest)})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _finished(work: Path) -> dict[str, int]:
    files = [file for pattern in ("*/lists-*.npy", "*/embeddings.npy") for file in work.glob(pattern)]
    whole = [file for file in files if file.stem.count(".") == 0 and (file.parent / "embedded.json").exists()]
    return {str(file): file.stat().st_mtime_ns for file in whole}


def _worker_of(pid: int, rng: random.Random) -> int | None:
    found = subprocess.run(["pgrep", "-P", str(pid)], check=False, stdout=subprocess.PIPE, text=True).stdout.split()
    return int(rng.choice(found)) if found else None


def drawn(shard: Shard, shared: tuple[torch.Tensor, int], first: int, count: int) -> None:
    """Embeddings of images of one product, some with a defect, that depend on their numbers only."""
    look, seed = shared
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
    patches = look + torch.randn(count, *look.shape, generator=generator)
    for image in range(-first % _DIRTY, count, _DIRTY):
        patches[image, image % len(look)] += 5 * look[0]
    shard.write(embeddings=patches.half().numpy())


def simulated(count: int, work: Path, engine: str) -> dict[str, float]:
    """The engine on so many drawn images."""
    executor = make_executor(engine, 2)
    places = _GRID[0] * _GRID[1]
    look = 3 * torch.randn(places, _CHANNELS, generator=torch.Generator().manual_seed(0))
    store, begin = FeatureStore(executor=executor), time.perf_counter()
    starts = range(0, count, SHARD)
    calls = [(Shard(work / f"{start:09d}"), start, min(SHARD, count - start)) for start in starts]
    for (shard, start, size), _ in zip(calls, executor.map(drawn, calls, (look, 0), print_nothing), strict=True):
        store.append(shard, [f"{i:09d}.png" for i in range(start, start + size)], (places, _CHANNELS))
    store.key, seconds = f"simulated {count}", {"images": count, "drawing": time.perf_counter() - begin}
    begin = time.perf_counter()
    found = refine_images(store, _GRID, Settings(), 0, Progress(disable=True))
    seconds["engine"] = time.perf_counter() - begin
    begin = time.perf_counter()
    gather_evidence(found, store.paths, np.argsort(-found.scales.scores)[:500])
    seconds["evidence"] = time.perf_counter() - begin
    dirty = np.arange(count) % _DIRTY == 0
    seconds["found"], seconds["wrong"] = float((~found.kept)[dirty].mean()), float((~found.kept)[~dirty].mean())
    seconds["disk_gb"] = sum(file.stat().st_size for file in work.rglob("*.npy")) / 2**30
    seconds["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return seconds


def print_nothing(_images: int) -> None:
    """Progress of no interest."""


def main() -> None:
    """Run a measurement and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["executors", "memory", "kill", "simulate"])
    parser.add_argument("folder", nargs="?", type=Path, help="images, but for simulate")
    parser.add_argument("--images", type=int, nargs="+", default=[None])
    parser.add_argument("--engine", choices=["local", "joblib", "ray"], default="local", help="of memory and simulate")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "simulate":  # each in a process of its own, for the memory
        rows = []
        code = "import json, sys; from pathlib import Path; from studies.scale import simulated\n"
        code += "print(json.dumps(simulated(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))"
        for count in options.images:
            work = options.out / f"simulated-{count}"
            rows.append(json.loads(run(code, str(count), str(work), options.engine)))
            print(rows[-1], flush=True)
            shutil.rmtree(work)
        table = pd.DataFrame(rows)
    elif options.what == "memory":
        lists = [listed(options.folder, count, options.out) for count in options.images]
        table = pd.DataFrame([
            {"images": one.stem, **curated(one, options.engine, options.out)} for one in lists
        ])  # fmt: skip
    else:
        images = listed(options.folder, options.images[0], options.out)
        if options.what == "executors":
            table = executors(images, options.out)
        else:
            table = kills(images, options.times, options.out, options.seed)
    table.to_csv(options.out / f"{options.what}.csv", index=False)
    print(table.to_markdown(index=False))


if __name__ == "__main__":
    main()
