"""A browser, where there is one."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("There is no Chromium here; on Debian and Ubuntu, install the package chromium.")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright (extra `dev`) is not installed.")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()
