"""The settings of Sphinx for the sources that build.py gathers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "learner"
author = copyright = "The learner authors"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "extension"]
exclude_patterns = ["README.md"]

# Notebooks come with their outputs.
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_dmath_allow_digits = False
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_theme = "furo"
html_title = "learner"
html_static_path = ["static"]
html_css_files = ["learner.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = (
    "div.highlight-python pre, div.highlight-pycon pre, div.highlight-sh pre, div.cell_input pre"
)
