"""Mechanical rules of plain language: python .ci/language.py [FILE|FOLDER …]; prints each breach, exits 1 on any."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

OPENING = re.compile(r"(What|Which|Where|How|Who|Whether)\b")
BANNED = re.compile(
    r"(?<!there )\bis no (?!longer\b|more\b)|\b(hands|workshop|passing folder|sittings?|pupils?|booths?|commanders?"
    r"|pronouncing|contenders?|takes? turns|its turn|soak|thaw(s|ed|ing)?|hears|says|tells)\b",
    re.IGNORECASE,
)


def prose(path: Path) -> list[tuple[int, str, bool]]:
    """Return (line, text, is docstring) of docstrings, comments and strings of a module, or of the lines of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [(number, line, False) for number, line in enumerate(text.splitlines(), 1)]
    comments = (one for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type == tokenize.COMMENT)
    found = [(one.start[0], one.string, False) for one in comments]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            found.append((node.body[0].lineno, docstring, True))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append((node.lineno, node.value, False))
    return found


if __name__ == "__main__":
    roots = [
        Path(name)
        for name in sys.argv[1:] or ("extract", "train", "evaluate", "pipelines", "tests", "docs", "README.md")
    ]
    files = [one for root in roots for one in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    breaches = [
        f"{path}:{line}: {found[0]!r}"
        for path in files
        if path.suffix in (".py", ".md", ".html", ".yaml")
        for line, text, is_docstring in prose(path)
        if (found := (is_docstring and OPENING.match(text)) or BANNED.search(text))
    ]
    print(*sorted(set(breaches)), f"{len(set(breaches))} breaches of plain language", sep="\n")
    sys.exit(bool(breaches))
