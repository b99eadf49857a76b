"""A hook of mkdocs: adds the pages outside docs/ to the site, and adapts relative links.

Links in the repository are relative and lead to files and directories, so that they work on GitHub.
The site consists of docs/, the README as its start page, the other pages below, and one page per
example with the example's files. mkdocs reports a link to anything else.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# The path of a page in the repository, and its path in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security_policy.md",
    "bench/peers/README.md": "bench.md",
    "examples/README.md": "examples/index.md",
}
LOCK_FILES = (".lock", "go.sum", "package-lock.json")
# A fenced block, which stays as it is, or the target of a link, perhaps with a heading.
_LINKS = re.compile(
    r"^(?P<fence>`{3,}).*?^(?P=fence)|\]\((?P<path>[^):#\s]+)(?P<heading>#\S+?)?\)", re.M | re.S
)


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    for name, paths in _examples().items():
        files.append(File.generated(config, f"examples/{name}.md", content=_example(name, paths)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    directory = _directory(uri)

    def adapt(link: re.Match[str]) -> str:
        if link["path"] is None:
            return link[0]
        path = posixpath.normpath(posixpath.join(directory, link["path"]))
        target, heading = _in_site(path)
        relative = posixpath.relpath(target, posixpath.dirname(uri))
        return f"]({relative}{link['heading'] or heading})"

    return _LINKS.sub(adapt, markdown)


def _examples() -> dict[str, list[str]]:
    """Return the files of each example in the repository, except those that a program wrote."""
    listed = subprocess.run(
        ["git", "ls-files", "examples/*"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, list[str]] = {}
    for path in listed.stdout.splitlines():
        if path not in PAGES and not path.endswith(LOCK_FILES):
            found.setdefault(path.split("/")[1], []).append(path)
    return found


def _example(name: str, paths: list[str]) -> str:
    """Return the page of an example: its README, and its files."""
    readme = f"examples/{name}/README.md"
    parts = [(ROOT / readme).read_text() if readme in paths else f"# {name}\n"]
    for path in paths:
        if path != readme and (text := (ROOT / path).read_text()):
            shown = path.removeprefix("examples/").removeprefix(f"{name}/")
            language = PurePosixPath(path).suffix.removeprefix(".")
            parts.append(f"## `{shown}` {{ #{shown} }}\n\n````{language}\n{text}````\n")
    return "\n".join(parts)


def _directory(uri: str) -> str:
    """Return the directory, in the repository, of the file from which a page was made."""
    for source, made in PAGES.items():
        if made == uri:
            return posixpath.dirname(source)
    return uri.removesuffix(".md") if uri.startswith("examples/") else "docs"


def _in_site(path: str) -> tuple[str, str]:
    """Return the page for a path in the repository, and the heading of the file, if it has one."""
    for known in (path, f"{path}/README.md"):
        if known in PAGES:
            return PAGES[known], ""
    if path.startswith("examples/"):
        _, name, *inside = path.split("/")
        heading = "" if inside in ([], ["README.md"]) else f"#{'/'.join(inside)}"
        return f"examples/{name}.md", heading
    return path.removeprefix("docs/"), ""
