"""Run the code cells of a notebook in the current folder, as Jupyter in the notebook's own.

cd docs && MPLBACKEND=Agg python ../.ci/notebook.py tour.ipynb
"""

import json
import sys
from pathlib import Path

namespace = {"__name__": "__main__"}
for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"{sys.argv[1]}, {cell['id']}", "exec"), namespace)
