"""report.html in a headless browser: nothing overflows a phone's screen, and the console stays silent."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from reports import sample_run

from shiftadd_cli.report.page import render_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFF = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
       "--disable-component-update")  # fmt: skip

# Measures the page from within and writes the result where --dump-dom shows it. A frame can be of any width, while a
# window has a minimum.
PROBE = """
<!DOCTYPE html><title>probe</title><iframe id="page" width="WIDTH" height="900" src="report.html"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = () => {
  const page = document.getElementById("page").contentDocument;
  const shown = [...page.querySelectorAll("main *, body > *")].filter((e) => e.getClientRects().length);
  const scrolls = (e) => e && e !== page.body && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
  const wide = shown.filter((e) => e.getBoundingClientRect().right > WIDTH + 1 && !scrolls(e));
  document.getElementById("found").textContent = JSON.stringify({
    shown: shown.length,
    width: page.documentElement.scrollWidth,
    wide: wide.map((e) => e.tagName + "." + e.className.toString()),
    drawings: [...page.querySelectorAll("svg")].map((e) => e.getBoundingClientRect().width),
  });
};
</script>
"""


def measure(folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """The probe's measurements of report.html in `folder` at a width in pixels, and the browser's console messages."""
    assert BROWSER is not None
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)))
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", *OFF, f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr",
         "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, flags=re.DOTALL)
    assert match, result.stdout[-2000:]
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(match[1])), console


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("runs", [1, 3])
def test_page_fits_and_is_silent(tmp_path: Path, width: int, runs: int) -> None:
    page = render_page([sample_run(f"a-rather-long-name-of-a-run-{index}") for index in range(runs)])
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    measured, console = measure(tmp_path, width)
    assert measured["shown"] > 50
    assert measured["wide"] == []
    assert measured["width"] <= width
    assert measured["drawings"]
    assert all(0 < drawing_width <= width for drawing_width in measured["drawings"])
    assert console == ""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_probe_detects_wide_elements_and_console_messages(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(
        "<!DOCTYPE html><body><main>" + "<p>x</p>" * 60 + '<div style="width: 2000px">x</div><svg></svg></main>'
        "<script>console.error('a fault')</script>"
    )
    measured, console = measure(tmp_path, 360)
    assert measured["wide"]
    assert "a fault" in console
