"""The page in headless Chromium, on a laptop and on a phone: drawn whole, without an error or a request."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report_world import STUDENTS, Made

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<iframe id=page width=WIDTH height=900 src="report/index.html"></iframe><pre id=found></pre><script>
page.onload = () => {
  page.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
  const doc = page.contentDocument, view = page.contentWindow, all = (of, what) => [...of.querySelectorAll(what)];
  const box = element => element.getBoundingClientRect(), charts = all(doc, "svg[role=img]");
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  const ground = cell => view.getComputedStyle(cell).backgroundColor;
  found.textContent = JSON.stringify({
    overflow: doc.documentElement.scrollWidth - view.innerWidth,
    requests: view.performance.getEntriesByType("resource").length,
    marks: charts.map(c => all(c, ".mark").filter(m => box(m).width > 2 && box(m).height > 2).length),
    widths: charts.map(c => box(c).width),
    outside: charts.map(c => all(c, "text").filter(t => box(t).left < -1 || box(t).right > view.innerWidth + 1).length),
    collisions: charts.map(c => all(c, ".halo text, rect + text").map(box).filter((one, index, boxes) =>
      boxes.slice(index + 1).some(other => !apart(one, other))).length),
    letters: charts.map(c => Math.min(...all(c, "text").map(t => box(t).height))),
    heat: all(doc, "table.heat").map(t => new Set(all(t, "td").map(ground)).size),
    inks: charts.map(c => view.getComputedStyle(c.querySelector("text")).fill)});
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("tasks", [4, 10])
def test_a_browser_draws_the_page_without_error(made: Made, ten: Made, tasks: int, width: int, tmp_path: Path) -> None:
    made = ten if tasks == 10 else made
    probe = made.root / f"probe-{width}.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)[1])  # type: ignore[index]
    assert found["overflow"] <= 0
    assert found["requests"] == 0
    trade_offs, curves, searches, pipeline = [len(STUDENTS) + 1] * 3, [1] * 4, [len(STUDENTS) + 2] * tasks, [4]
    assert found["marks"] == [*trade_offs, *curves, *searches, *pipeline]
    assert min(found["widths"][:-1]) > 290  # the pipeline is as wide as its stages need
    assert set(found["outside"]) == {0}
    assert set(found["collisions"]) == {0}
    assert min(found["letters"]) >= 9
    # three students beside their teacher, then the weights of six upstreams: shades that differ
    assert len(found["heat"]) == 3 + 6 and min(found["heat"]) > 1
    assert set(found["inks"]) != {"rgb(0, 0, 0)"}
