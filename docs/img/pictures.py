"""Screenshots of the report for the README: `python docs/img/pictures.py report/index.html`; needs Chromium.

Each picture shows the page at the width of a laptop, with some parts hidden, as lossless WebP.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageChops

WIDTH, HEIGHT = 1280, 3000  # CSS pixels; the height is that of the window, cropped to the content
MARGIN = 24  # below the content
HIDDEN = {  # name of the picture -> CSS selector of the parts left out
    "report-results": "nav, section:not(#results, #trade-off), #results > :not(h2, .scroll:has(.headline)), footer",
    "report-layers": ".masthead, main > :not(#layers), footer",
}


def main(page: Path) -> None:
    """Write one picture for each entry of HIDDEN beside this file."""
    for name, hidden in HIDDEN.items():
        with TemporaryDirectory() as folder:
            html, shot = Path(folder, "page.html"), Path(folder, "page.png")
            rule = f"<style>{hidden} {{ display: none }} section {{ margin-top: 2.5rem }}</style></head>"
            html.write_text(page.read_text(encoding="utf-8").replace("</head>", rule), encoding="utf-8")
            command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                       f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}"]  # fmt: skip
            subprocess.run([*command, f"--screenshot={shot}", html.as_uri()], check=True, capture_output=True)
            picture = Image.open(shot).convert("RGB")
        # The last row is background: everything that differs from its colour is content.
        background = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
        content = ImageChops.difference(picture, background).getbbox()
        assert content, f"{page} is an empty page"
        picture = picture.crop((0, 0, WIDTH, min(picture.height, content[3] + MARGIN)))
        out = Path(__file__).with_name(f"{name}.webp")
        picture.save(out, lossless=True, quality=100, method=6)
        print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
