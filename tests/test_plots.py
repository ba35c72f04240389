"""The page of `dvc plots show` and `dvc plots diff`: drawn without the network. All curves here are invented."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.report_world import Tables, write_tsv
from tests.test_report_browser import CHROMIUM

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of two curves at a commit and changed since, and of a plot that is not a line."""
    folder = tmp_path_factory.mktemp("plots")

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    run("git", "init", "--quiet")
    run(sys.executable, "-m", "dvc", "init", "--quiet")
    for name in ("config", "plots.html"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
    curves: list[tuple[int, float]] = [(5, 1.5), (10, 1.25), (15, 1.0)]
    for student in ("one", "two"):
        write_tsv(folder / f"runs/{student}/loss.tsv", curves)
    (folder / "words.csv").write_text("label,found\nyes,no\nno,no\n")
    plots = [{f"runs/{student}/loss.tsv": {"x": "step", "y": "loss"}} for student in ("one", "two")]
    words = {"words.csv": {"x": "label", "y": "found", "template": "confusion"}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"plots": [*plots, words]}))
    run("git", "add", "--all")
    run("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", "one")
    write_tsv(folder / "runs/two/loss.tsv", [(5, 1.5), (10, 1.0)])
    run(sys.executable, "-m", "dvc", "plots", "diff", "HEAD", "--out", "drawn")
    return folder / "drawn/index.html"


def test_the_page_of_plots_fetches_nothing(page: Path) -> None:
    html = page.read_text()
    assert html.count("vegaEmbed('#") == 3
    assert Tables(html).links == []  # no src and no href
    assert not re.search(r"cdn\.|@import|url\(|fetch\(|import\(", html)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_without_a_network_draws_every_curve(page: Path, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
        "--disable-background-networking", "--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    figures = re.findall(r"<figure>.*?</figure>", done.stdout, re.DOTALL)
    points = [[line.count("L") + 1 for line in re.findall(r' d="(M [^"H]*)"', figure)] for figure in figures]
    assert sorted(points) == [[], [2, 3], [3, 3]]  # workspace and HEAD; the confusion matrix is named, not drawn
    one, two = (re.findall(r' d="M ([0-9.]+) ([0-9.]+) L', figure) for figure in figures if "<svg" in figure)
    assert set(one) == set(two) == {("52", "10")}  # the first step and the highest loss: left, at the top
    (note,) = [figure for figure in figures if "<svg" not in figure]
    assert "plots.html_template" in note
