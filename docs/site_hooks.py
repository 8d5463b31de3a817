"""What `mkdocs build` does beside its plugins: links to files of the repository, and notebooks as pages.

The pages of `docs/` are read in the repository, too, where a link such as `../recipes/NAME.yaml` leads to that file. The
site has no such file, and no address of the repository to send readers to: there the link becomes the file's name.
A link to a file that does not exist is a warning, which ends a strict build.
"""

import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.site_hooks")
LINK = re.compile(r"(?<!!)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])+)\]\((?P<target>\.\./[^)\s#]*)(?:#[^)\s]*)?\)")
DOCSTRING_TYPE = re.compile(r"<code>`([^<`]+)`(, \*optional\*)?</code>")
FENCED = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each notebook, made of its cells and their saved outputs."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            notebook = json.loads(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
            page = str(PurePosixPath(file.src_uri).with_suffix(".md"))
            files.append(File.generated(config, page, content=notebook_page(notebook)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Types in the docstrings of transformers' form, (`str`, *optional*), without the marks of Markdown."""
    return DOCSTRING_TYPE.sub(lambda found: f"<code>{found[1]}{', optional' if found[2] else ''}</code>", html)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that leave `docs/` become file names; links to notebooks lead to their pages."""
    folder = Path(config["docs_dir"], page.file.src_uri).parent
    parts = FENCED.split(markdown)
    return "".join(
        part if part.startswith("```") else rewrite_links(part, folder, Path(config["docs_dir"]), page)
        for part in parts
    )


def rewrite_links(text: str, folder: Path, docs: Path, page: Any) -> str:
    """`text` with the links of `LINK`'s form rewritten; `folder` is the page's own."""

    def rewrite(match: re.Match[str]) -> str:
        target = (folder / match["target"]).resolve()
        if not target.exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_uri, match["target"])
        if target.is_relative_to(docs.resolve()):
            return match[0]
        root = docs.resolve().parent
        name = str(target.relative_to(root)) if target.is_relative_to(root) else match["target"]
        words = match["words"]
        return words if name in words else f"{words} (`{name}`)"

    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", LINK.sub(rewrite, text))


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: text cells as they are, code in fences, outputs below; images are in the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [output_markdown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part) + "\n"


def output_markdown(output: dict[str, Any]) -> str:
    """One saved output: printed text, an image, or the text of a value; nothing for what the page cannot show."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = output.get("data", {})
    for kind in ("image/jpeg", "image/png"):
        if kind in data:
            return f"![what the cell shows](data:{kind};base64,{''.join(data[kind]).strip()})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""
