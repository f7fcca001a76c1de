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


def open_sections(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give a section that begins in the middle of a line, "Errors: those of torch.nn", a line for its title.

    Napoleon knows a section by its title alone on a line; a short one is easier to read in the source without. An
    initial ("R. Jozefowicz") is escaped, or it would begin a list. What Python says of a field by itself is left out.
    """
    if len(lines) == 1 or (len(lines) == 2 and not lines[1]):
        lines[:] = [line for line in lines if not line.startswith("Alias for field number")]
    opened: list[str] = []
    inside = False
    for line in lines:
        found = re.match(rf"({SECTIONS}): +(\S.*)", line)
        if found:
            opened += ["", f"{found[1]}:", "    " + re.sub(r"^([A-Z])\. ", r"\1\\. ", found[2])]
            inside = True
        elif inside and line.strip():
            opened.append(f"    {line.strip()}")
        else:
            inside = False
            opened.append(line)
    lines[:] = opened


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
    app.connect("autodoc-process-docstring", open_sections, priority=400)
    app.connect("build-finished", copy_assets)
    app.add_html_math_renderer("mathml", (formula, None), (formula_block, None))
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
