"""The site's pages: README.md, docs/, and whatever else of the repository these link to.

Links are written as GitHub reads them, from file to file of the repository. Here they become links of the
site.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
PLACES = {Path("README.md"): "index.md"}
"""The page of the site that each file of the repository is, beside those of docs/."""


def linked(file: Path) -> list[Path]:
    """The files, relative to the repository, to which the links of a page lead."""
    found = LINK.findall(text_of(file))
    paths = (Path(os.path.normpath(file.parent / target)) for _, _, target, _ in found)
    return [path for path in paths if (ROOT / path).is_file()]


def text_of(file: Path) -> str:
    """The text of a file of the repository."""
    return (ROOT / file).read_text(encoding="utf-8")


def place(file: Path) -> str:
    """Where a file of the repository lies on the site."""
    if file.parts[0] == "docs":
        return file.relative_to("docs").as_posix()
    return PLACES[file]


def source_page(file: Path) -> str:
    """A page with the text of a file; of Python, a section for each class and function of its first level."""
    text = text_of(file)
    starts = {1: file.as_posix()}
    if file.suffix == ".py":
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                starts[min(each.lineno for each in (node, *node.decorator_list))] = node.name
    lines = text.splitlines()
    ends = [*list(starts)[1:], len(lines) + 1]
    parts = []
    for (start, title), end in zip(starts.items(), ends, strict=True):
        code = "\n".join(lines[start - 1 : end - 1]).rstrip()
        level, language = "#" if start == 1 else "##", file.suffix[1:]
        parts.append(f'{level} {title}\n\n~~~~{language} linenums="{start}"\n{code}\n~~~~\n')
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add to the pages of docs/ the README and every file that a page links to."""
    from mkdocs.structure.files import File

    waiting = [Path("README.md"), *(file.relative_to(ROOT) for file in sorted((ROOT / "docs").glob("*.md")))]
    seen = {*waiting}
    for page in waiting:
        for file in linked(page):
            if file in seen:
                continue
            seen.add(file)
            if file.suffix == ".md":
                waiting.append(file)
            if file.parts[0] != "docs":
                source = file.suffix in (".py", ".yaml")
                PLACES[file] = f"source/{file}.md" if source else file.as_posix()
    for file, target in PLACES.items():
        own = (
            {"content": source_page(file)} if target.startswith("source/") else {"abs_src_path": ROOT / file}
        )
        files.append(File.generated(config, target, **own))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page of the repository into links of the site."""
    uri = page.file.src_uri
    file = next((file for file, target in PLACES.items() if target == uri), Path("docs", uri))
    if uri.startswith("source/") or not (ROOT / file).is_file():
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.groups()
        path = Path(os.path.normpath(file.parent / target))
        if not (ROOT / path).is_file():
            return match[0]
        if path.suffix == ".py" and not anchor:
            anchor = "#" + label.strip("`").split(".")[0].lower()
        return f"{mark}[{label}]({os.path.relpath(place(path), Path(uri).parent)}{anchor or ''})"

    return LINK.sub(rewritten, markdown)
