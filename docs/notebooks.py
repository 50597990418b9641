"""The notebooks as pages, without directives, and the gallery of the examples."""

import base64
import io
import json
import re
from pathlib import Path

from pages import modules
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "base": "what knows no training: nested values, files, hashes, pictures",
    "loop": "stages, the loop, the learner, its data",
    "watch": "what observes and changes nothing",
    "steer": "what changes how a net trains",
    "keep": "exact stops, and trials that leave no trace",
    "check": "is it right? The doctor, and the kit for callbacks",
    "runs": "a folder for each run, and the command line",
    "use": "what a trained model is for",
}
_SKIP = re.compile(r"#\|\s*(hide|default_exp)\b")
_DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def title_and_purpose(notebook):
    "The title of a notebook, and the sentence below it, as Markdown."
    text = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
    purpose = re.search(r"^> ?(.+)$", text, re.MULTILINE)
    return title, purpose[1] if purpose else ""


def module_of(notebook):
    "The module that a notebook makes, such as `loop.loop`; none for an example."
    for cell in notebook["cells"]:
        found = re.search(r"^#\| *default_exp +(\S+)", source(cell), re.MULTILINE)
        if found:
            return found[1]
    return None


def merged(outputs):
    "Outputs in which what was printed in pieces is one text."
    found = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == "stream" and output.get("name") == last.get("name"):
            found[-1] = last | {"text": "".join(last["text"]) + "".join(output["text"])}
        else:
            found.append(output)
    return found


def page(path):
    "A notebook as a page: the text of a cleaned notebook."
    notebook = read(path)
    module = module_of(notebook)
    cells = []
    for cell in notebook["cells"]:
        text = source(cell)
        if cell["cell_type"] == "code":
            text = "" if _SKIP.search(text) else _DIRECTIVE.sub("", text).strip("\n")
            if not text:
                continue
            cell = cell | {"outputs": merged(cell["outputs"])}
        cells.append(
            cell
            | {"source": re.sub(r"\]\(([./\w]*examples/own_trainer)\)", r"](\1/README.md)", text)}
        )
    if module and re.fullmatch(r"[a-z]+\.[a-z]\w+", module):
        name = f"`learner.{module}`"
        page = f"[{name}](/reference/modules/{module}.md)" if module in modules() else name
        where = f"It makes the module {page}."
        cells.insert(1, {"cell_type": "markdown", "id": "module", "metadata": {}, "source": where})
    # The state of widgets would make a page load their code from another host.
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "widgets"}
    return json.dumps(notebook | {"cells": cells, "metadata": metadata})


def notebooks(folder):
    return sorted((ROOT / "nbs" / folder).glob("[!.]*.ipynb"))


def in_reading_order(folder):
    "The notebooks of a folder, each after those of the folder that it stands on."
    paths = {path.stem: path for path in notebooks(folder)}
    imports = rf"from learner\.{folder}\.(\w+) import"
    needs = {}
    for name, path in paths.items():
        code = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
        exported = "\n".join(text for text in code if text.startswith("#| export"))
        needs[name] = {*re.findall(imports, exported)} & paths.keys() - {name}
    order = []
    while len(order) < len(paths):
        order.append(next(name for name in paths if name not in order and needs[name] <= {*order}))
    return [paths[name] for name in order]


def thumbnail(notebook, width=640):
    "The first picture of a notebook as a small PNG; None if it has none."
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    for output in outputs:
        if "image/png" not in output.get("data", {}):
            continue
        image = Image.open(io.BytesIO(base64.b64decode("".join(output["data"]["image/png"]))))
        image.thumbnail((width, width))
        found = io.BytesIO()
        image.save(found, "png", optimize=True)
        return found.getvalue()
    return None


def write_gallery(keep):
    "A card for each example."
    paths = notebooks("examples")
    entries = [
        (path, f"/nbs/examples/{path.name}", *title_and_purpose(read(path)), path) for path in paths
    ]
    trainer = ROOT / "nbs/examples/own_trainer/README.md"
    entries.append(
        (
            trainer,
            "/nbs/examples/own_trainer/README.md",
            "A trainer of your own",
            "Data, a model and a config in one module, for the command line",
            ROOT / "docs/start/trainer.ipynb",
        )
    )
    cards, listed = [], []
    for path, link, title, purpose, pictured in entries:
        name = path.stem if path.suffix == ".ipynb" else path.parent.name
        picture = thumbnail(read(pictured))
        if picture:
            keep(f"gallery/{name}.png", picture)
        image = (
            [f":img-top: /gallery/{name}.png", f":img-alt: A picture from {title}"]
            if picture
            else []
        )
        cards.append(
            "\n".join(
                [
                    f":::{{grid-item-card}} {title}",
                    f":link: {link.rpartition('.')[0]}",
                    ":link-type: doc",
                    *image,
                    "",
                    purpose,
                    ":::",
                ]
            )
        )
        listed.append(link)
    keep(
        "gallery/index.md",
        "\n\n".join(
            [
                "# Gallery",
                "Whole examples that run, each from its data to its result.",
                "::::{grid} 1 2 3 3\n:gutter: 3\n",
                *cards,
                "::::",
                "\n".join(["```{toctree}", ":hidden:", "", *listed, "```"]),
            ]
        ),
    )


def write_design(keep):
    "A page for each folder, which lists its notebooks."
    folders = [folder for folder in FOLDERS if notebooks(folder)]
    for folder in folders:
        paths = in_reading_order(folder)
        rows = []
        for path in paths:
            title, purpose = title_and_purpose(read(path))
            rows.append(f"[{title}](/nbs/{folder}/{path.name})\n: {purpose}")
        tree = [
            "```{toctree}",
            ":hidden:",
            "",
            *(f"/nbs/{folder}/{path.name}" for path in paths),
            "```",
        ]
        about = FOLDERS[folder]
        keep(
            f"design/{folder}.md",
            "\n\n".join(
                [
                    f"# {folder}",
                    about[0].upper() + about[1:] + ". Each notebook builds on those above it.",
                    *rows,
                    "\n".join(tree),
                ]
            ),
        )
    return folders


def write_notebooks(keep):
    "Every notebook, and the files of the example that is a folder."
    for path in (ROOT / "nbs").rglob("[!.]*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        keep(path.relative_to(ROOT), page(path))
    for path in (ROOT / "nbs/images").glob("*.png"):
        keep(path.relative_to(ROOT), path.read_bytes())
    for path in (ROOT / "docs/start").glob("[!.]*.ipynb"):
        # In the repository the notebooks are two folders up, on the site one.
        keep(path.relative_to(ROOT / "docs"), page(path).replace("](../../nbs/", "](../nbs/"))
    place = Path("nbs/examples/own_trainer")
    files = "\n\n".join(
        f"## {name}\n\n```{language}\n{(ROOT / place / name).read_text('utf-8').rstrip()}\n```"
        for name, language in (("own_trainer.py", "python"), ("spirals.yaml", "yaml"))
    )
    text = (ROOT / place / "README.md").read_text(encoding="utf-8")
    keep(place / "README.md", f"{text}\n{files}\n")
