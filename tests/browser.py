"A browser for the tests: whichever Chromium the machine has."
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

SYSTEM = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"]   # tried in this order, before playwright's own


def find_chromium(own: str | None = None) -> str | None:
    "Path of a Chromium that can be started: the system's, one on the PATH, or playwright's `own`; None if there is none."
    found = [path for path in SYSTEM if os.access(path, os.X_OK)]
    found += [path for name in ["chromium", "chromium-browser", "google-chrome"] if (path := shutil.which(name))]
    if own and Path(own).exists(): found.append(own)
    return found[0] if found else None


@contextmanager
def open_browser():
    "A playwright Browser (sync API), closed at the end; the test is skipped where playwright or Chromium is missing."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None: pytest.skip("no Chromium on this machine")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try: yield browser
        finally: browser.close()
