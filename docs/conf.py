"""How the site is built: Markdown by MyST, the API reference from docstrings by autodoc and napoleon; `make docs`.

The source folder is the whole tree, held to its documents by `include_patterns`. So a link between README.md, DESIGN.md
and docs/ is the same on a forge and in the site.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rnnkit  # noqa: E402
from rnnkit.cli.main import parser  # noqa: E402

project = "rnnkit"
version = release = rnnkit.__version__
html_title = f"rnnkit {version}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_extra_path = ["index.html"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "docs/assets", "**/_C*"]
myst_heading_anchors = 4
default_role = "code"  # docstrings write `name`, as Markdown does
smartquotes_action = "D"  # dashes alone: h' is h'

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
autodoc_default_options = {"exclude-members": "extra_repr"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Inputs", "Outputs", "Errors", "Source"]
SECTIONS = "Args|Inputs|Outputs|Output|Returns|Raises|Errors|Source"


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make of a docstring as it is read in the source one that napoleon and reST read likewise.

    - A section may begin in the middle of a line, "Errors: those of torch.nn"; napoleon wants its title alone.
    - An initial that begins one ("R. Jozefowicz") is escaped, or it would be the first item of a list.
    - An indented block is shown as it is, as in Markdown.
    - What Python says of a tuple's field by itself is left out.
    """
    made: list[str] = []
    section = False  # the last line that was not indented is a title, or a directive
    opened = literal = False
    for line in lines:
        title = re.match(rf"({SECTIONS}):(?: +(\S.*))?$", line)
        indented = line.startswith("    ")
        if title and title[2]:
            made += ["", f"{title[1]}:", "    " + re.sub(r"^([A-Z])\. ", r"\1\\. ", title[2])]
            section = opened = True
            continue
        if opened and line.strip():
            made.append(f"    {line.strip()}")
            continue
        opened = False
        if line.strip() and not indented:
            section, literal = bool(title) or line.startswith(".."), False
        elif indented and not section and not literal and made and not made[-1].strip():
            made += ["::", ""]
            literal = True
        made.append("" if line.startswith("Alias for field number") else line)
    lines[:] = made


class CommandHelp(SphinxDirective):
    """`command-help` with a command's name: what `python -m rnnkit NAME --help` prints."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A block of text as it is."""
        command: Any = parser()
        if self.arguments:
            command = command._subparsers._group_actions[0].choices[self.arguments[0]]
        text = command.format_help()
        return [nodes.literal_block(text, text, language="text")]


def formula(self: Any, node: nodes.math) -> None:
    """MathML, which browsers show without a script from elsewhere."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def formula_block(self: Any, node: nodes.math_block) -> None:
    """The same on lines of its own."""
    self.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def copy_assets(app: Sphinx, exception: Exception | None) -> None:
    """Pictures that README shows by HTML, for light and dark pages; Sphinx copies only those it knows of."""
    if exception is None and (ROOT / "docs/assets").is_dir():
        shutil.copytree(ROOT / "docs/assets", Path(app.outdir) / "docs/assets", dirs_exist_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what is above; 400 is before napoleon's 500."""
    app.connect("autodoc-process-docstring", to_rst, priority=400)
    app.connect("build-finished", copy_assets)
    app.add_html_math_renderer("mathml", (formula, None), (formula_block, None))
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
