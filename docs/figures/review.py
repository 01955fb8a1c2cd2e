"""The picture of the review page: solar cells of ELPV, a fifth of them cracked, through `curate` and `review`.

    python docs/figures/review.py [--out docs/figures/review.png]

Answers the first page and some of the second as the labels have it, and takes a picture. Needs the extra `dev`, and
Chromium.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from anomalib_metarefine import ELPV, Contaminated, curate

_WIDTH, _HEIGHT = 1400, 900
_COLOURS = 128  # of the picture's palette: photographs are grey


def make_folder(folder: Path, images: int, dirty: float) -> tuple[Path, set[str]]:
    """Copy cells to one folder and curate it.

    Returns:
        tuple[Path, set[str]]: Folder of the curation, and names of the dirty images.
    """
    datamodule = Contaminated(ELPV("mono", train_images=images), dirty, seed=0)
    datamodule.setup()
    (folder / "line7/good").mkdir(parents=True)
    for path in datamodule.train_data.samples.image_path:
        shutil.copy(path, folder / "line7/good")
    os.chdir(folder)  # the page shows the path as it was given
    curate("line7/good").write("line7-curation")
    return folder / "line7-curation", {Path(path).name for path in datamodule.injected}


def answer(page: Page, dirty: set[str]) -> None:
    """Reject the dirty images of a page by keyboard, and keep the rest."""
    cards = page.locator(".card")
    for name in cards.locator(".name").all_text_contents():
        page.keyboard.press("r" if name in dirty else "k")
        page.wait_for_timeout(200)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--dirty", type=float, default=0.2, help="share of dirty images")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    out = options.out.resolve()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("There is no Chromium here; on Debian and Ubuntu, install the package chromium.")
    with tempfile.TemporaryDirectory() as folder:
        curation, dirty = make_folder(Path(folder), options.images, options.dirty)
        command = [sys.executable, "-u", "-m", "anomalib_metarefine.cli", "review", str(curation), "--no-browser"]
        server = subprocess.Popen([*command, "--by", "docs"], stdout=subprocess.PIPE, text=True)
        try:
            address = re.search(r"http\S+", server.stdout.readline())[0]
            with sync_playwright() as running:
                browser = running.chromium.launch(executable_path=chromium)
                page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
                page.goto(address)
                page.wait_for_selector(".card")
                answer(page, dirty)
                page.keyboard.press(" ")
                page.wait_for_timeout(1500)
                for name in page.locator(".card .name").all_text_contents()[:5]:
                    page.keyboard.press("r" if name in dirty else "k")
                    page.wait_for_timeout(300)
                page.keyboard.press("m")
                page.wait_for_timeout(1500)
                page.screenshot(path=out)
                browser.close()
        finally:
            server.terminate()
            server.wait()
        os.chdir(out.parent)
    Image.open(out).convert("RGB").quantize(_COLOURS).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
