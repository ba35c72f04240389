"""The README's pictures of the report: `python docs/img/pictures.py report/index.html`, with Chromium on the path.

Each is the page itself, a laptop wide, with some of its parts hidden, as lossless WebP.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageChops

WIDTH = 1280
HIDDEN = {
    "report-results": "nav, section:not(#results, #trade-off), #results > :not(h2, .scroll), footer",
    "report-layers": ".masthead, main > :not(#layers, #weights), #weights figure:nth-child(n+3), footer",
}


def main(page: Path) -> None:
    for name, hidden in HIDDEN.items():
        with TemporaryDirectory() as folder:
            html, shot = Path(folder, "page.html"), Path(folder, "page.png")
            rule = f"<style>{hidden} {{ display: none }} section {{ margin-top: 2.5rem }}</style></head>"
            html.write_text(page.read_text(encoding="utf-8").replace("</head>", rule), encoding="utf-8")
            command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                       f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},3000"]  # fmt: skip
            subprocess.run([*command, f"--screenshot={shot}", html.as_uri()], check=True, capture_output=True)
            picture = Image.open(shot).convert("RGB")
        ground = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
        drawn = ImageChops.difference(picture, ground).getbbox()
        assert drawn, f"{page} is an empty page"
        picture = picture.crop((0, 0, WIDTH, min(picture.height, drawn[3] + 24)))
        out = Path(__file__).with_name(f"{name}.webp")
        picture.save(out, lossless=True, quality=100, method=6)
        print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
