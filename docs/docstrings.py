"""Docstrings and signatures as Markdown."""

import inspect
import re
from textwrap import dedent

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
_HEAD = re.compile(rf"^({'|'.join(SECTIONS)}):[ \t]*$", re.MULTILINE)
_ENTRY = re.compile(r"^([*\w][\w*, .|\[\]\"']*?)(?: \(([^)]*)\))?:\s+(?=\S)", re.MULTILINE)
_CODE = re.compile(r"(`+[^`]*`+)")
_MODULES = re.compile(r"\b(?:[a-zA-Z_]\w*\.)+(?=[A-Za-z])")
_PLACE = re.compile(r"<.* at 0x[0-9a-f]+>|<(?:function|class|object)[^>]*>")


def escaped(text):
    "Prose in which no character is taken for markup, except for that of code."
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([<*$\[\]]|\b_|_\b)", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def sections(doc):
    "A docstring as pairs of a heading, empty for prose, and a text, in order."
    found, rest = [], doc.strip("\n")
    while match := _HEAD.search(rest):
        found.append(("", rest[: match.start()].strip("\n")))
        lines, body = rest[match.end() :].lstrip("\n").split("\n"), []
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        found.append((match[1], dedent("\n".join(body)).strip("\n")))
        rest = "\n".join(lines)
    return [(head, text) for head, text in [*found, ("", rest.strip("\n"))] if text]


def entries(text):
    "The names of a section and what is said of each."
    starts = [
        match
        for match in _ENTRY.finditer(text)
        if match.start() == 0 or text[match.start() - 1] == "\n"
    ]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [
        (match[1], " ".join(text[match.end() : end].split()))
        for match, end in zip(starts, ends, strict=True)
    ]


def annotation(value):
    "A type as one writes it, without the modules that its names come from."
    if value is inspect.Parameter.empty:
        return ""
    return _MODULES.sub("", inspect.formatannotation(value)).replace("NoneType", "None")


def default(value):
    return _PLACE.sub("...", _MODULES.sub("", repr(value)) if callable(value) else repr(value))


def parameters(value):
    "The parameters of what can be called, by name; none where Python cannot tell."
    try:
        return dict(inspect.signature(value).parameters)
    except (ValueError, TypeError):
        return {}


def signature(name, value):
    "A call as one writes it, over several lines if it is long."
    words, keyword_only, positional_only = [], False, False
    for each in (each for key, each in parameters(value).items() if key not in ("self", "cls")):
        if each.kind is each.KEYWORD_ONLY and not keyword_only:
            words.append("*")
        keyword_only |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        if positional_only and each.kind is not each.POSITIONAL_ONLY:
            words.append("/")
        positional_only = each.kind is each.POSITIONAL_ONLY
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        ending = "" if each.default is each.empty else f"={default(each.default)}"
        words.append(f"{stars}{each.name}{ending}")
    if positional_only:
        words.append("/")
    line = f"{name}({', '.join(words)})"
    return (
        line
        if len(line) <= 72
        else "\n".join([f"{name}(", *(f"    {word}," for word in words), ")"])
    )


def definition(names, text, known):
    "A parameter, its type and default, and what is said of it."
    about = []
    each = known.get(names.lstrip("*"))
    if each is not None and annotation(each.annotation):
        about.append(f"`{annotation(each.annotation)}`")
    if each is not None and each.default is not each.empty:
        about.append(f"default `{default(each.default)}`")
    head = ", ".join(f"`{name.strip()}`" for name in names.split(","))
    return f"{head}{': ' * bool(about)}{', '.join(about)}\n: {escaped(text)}"


def prose(text):
    "Paragraphs; what is indented stays as it is."
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(
        block
        if block.startswith("    ")
        else re.sub(r"\n(?=    )", "\n\n", block)
        if "\n    " in block
        else escaped(block)
        for block in blocks
    )


def markdown(doc, value=None):
    "A docstring as Markdown; `value` says of which parameters it tells."
    known, parts = parameters(value) if value is not None else {}, []
    for head, text in sections(doc):
        found = entries(text) if head in ("Args", "Attributes", "Raises") else []
        if not head:
            parts.append(prose(text))
        elif head.startswith("Example"):
            parts.append(f"**Example**\n\n```pycon\n{text}\n```")
        elif found:
            title = {"Args": "Arguments"}.get(head, head)
            rows = [
                definition(names, said, known if head == "Args" else {}) for names, said in found
            ]
            parts += [f"**{title}**", *rows]
        else:
            parts += [f"**{head}**", escaped(text)]
    return "\n\n".join(parts)


def purpose(value):
    "The first line of a docstring."
    return (inspect.getdoc(value) or "").strip().partition("\n")[0]
