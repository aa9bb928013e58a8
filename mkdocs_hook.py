"""What the site has beyond docs/: the README as its first page, other files that pages link to, and the reference.

So the pages are written for the repository, with links that hold there; here these become links that hold in the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<before>\]\()(?P<target>(?!https?:|mailto:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?(?P<after>\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu: the pages of the README's table in its order, and the reference."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read on")[2]
    linked = [placed(target, "README.md") for _, target, _, _ in LINK.findall(table)]
    parts: dict[str, list[str]] = {"Guide": [], "Measured": [], "Contributing": []}
    for place in dict.fromkeys(place for place in linked if place and place.endswith(".md")):
        measured = place.startswith(("experiments", "numbers", "benchmarks", "gpu"))
        parts["Contributing" if "CONTRIBUTING" in place else "Measured" if measured else "Guide"].append(place)
    parts["Measured"] += ["results/README.md"]
    parts["Reference"] = [f"reference/{name}.md" for name in config.extra["reference"]]
    config.nav = [{"Start": "index.md"}, *({name: pages} for name, pages in parts.items())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, what it and the pages link to elsewhere in the repository, and the reference's pages."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for source in waiting:  # grows as it goes
        place = placed(source, "")
        assert place is not None, source
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            targets = (resolved(found["target"], source) for found in LINK.finditer(text))
            waiting += [target for target in targets if target and target not in waiting]
    for name, modules in config.extra["reference"].items():
        content = f"# {name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links that hold in the repository into those of the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    source = "README.md" if here == "index.md" else here.removeprefix("repository/")
    source = source if here in ("index.md", f"repository/{source}") else f"docs/{source}"

    def there(found: re.Match[str]) -> str:
        place = placed(found["target"], source)
        if place is None:
            return found[0]  # to be refused, by its own name
        target = os.path.relpath(place, PurePosixPath(here).parent)
        return f"{found['before']}{target}{found['anchor'] or ''}{found['after']}"

    return LINK.sub(there, markdown)


def resolved(target: str, source: str) -> str | None:
    """The file of the repository that a link in ``source`` leads to; None where there is none."""
    path = Path(os.path.normpath(ROOT / PurePosixPath(source).parent / target))
    path = path / "README.md" if path.is_dir() else path
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None


def placed(target: str, source: str) -> str | None:
    """Where the site has what a link in ``source`` leads to."""
    if (path := resolved(target, source)) is None:
        return None
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
