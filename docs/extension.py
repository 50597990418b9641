"""What the site adds to Sphinx: formulas without a script, links to names, a short sidebar."""

from functools import cache
from typing import ClassVar

import furo
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from furo.navigation import get_navigation_tree
from pages import names_and_places
from sphinx.search.en import SearchEnglish
from sphinx.transforms.post_transforms import SphinxPostTransform


class LinkNames(SphinxPostTransform):
    "A public name that is written as code becomes a link to its page."

    default_priority = 700
    places: ClassVar[dict[str, str]] = {}

    def run(self, **kwargs):
        here = self.env.docname
        for literal in self.document.findall(nodes.literal):
            page, _, anchor = self.places.get(literal.astext().removesuffix("()"), "").partition(
                "#"
            )
            foreign = here.startswith("coming_from/") and self.in_first_column(literal)
            if not page or page == here or foreign or not self.may_link(literal):
                continue
            address = self.app.builder.get_relative_uri(here, page) + (anchor and f"#{anchor}")
            link = nodes.reference("", "", literal.deepcopy(), internal=True, refuri=address)
            literal.parent.replace(literal, link)

    def in_first_column(self, node):
        "There a table has the names of another library, which may be spelt like ours."
        while node and not isinstance(node, nodes.entry):
            node = node.parent
        return node is not None and node.parent.index(node) == 0

    def may_link(self, node):
        "Links do not nest, and titles stand in the sidebar too."
        while node := node.parent:
            if isinstance(node, nodes.reference | nodes.title | nodes.term):
                return False
        return True


def inline_math(self, node):
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def display_math(self, node):
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def short_sidebar(context):
    "Only the branch of the page is unfolded: hundreds of links on each page help nobody."
    if "toctree" not in context:
        return ""
    return get_navigation_tree(
        context["toctree"](collapse=True, titles_only=True, maxdepth=-1, includehidden=True)
    )


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.add_post_transform(LinkNames)
    LinkNames.places = names_and_places()
    furo._compute_navigation_tree = short_sidebar
    SearchEnglish.stem = cache(SearchEnglish.stem)  # the same words come on every page
    return {"parallel_read_safe": True, "parallel_write_safe": True}
