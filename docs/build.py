"""Gather the sources of the site and let Sphinx make the pages: `python docs/build.py _docs`."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(1, str(ROOT))  # the checkout itself is documented, whatever is installed

BY_HAND = ("index.md", "start", "coming_from", "reference", "design", "static", "conf.py")


class Sources:
    "The folder of sources."

    def __init__(self, folder):
        self.folder, self.kept = Path(folder), set()

    def __call__(self, name, content):
        path = self.folder / name
        data = content if isinstance(content, bytes) else content.encode()
        self.kept.add(path)
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def take(self, name):
        "Copy a file or a folder that is written by hand."
        place = HERE / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and path.suffix in (".md", ".css", ".py", ".svg"):
                self(path.relative_to(HERE), path.read_bytes())

    def tidy(self):
        "Remove what an earlier build has left."
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.kept:
                path.unlink()


def llms_txt(purposes):
    "What a program that reads the site wants to know first (https://llmstxt.org)."
    from notebooks import read, title_and_purpose
    from pages import modules, public

    start = {
        path.stem: title_and_purpose(read(path))
        for path in sorted((HERE / "start").glob("[!.]*.ipynb"))
    }
    others = [path.stem for path in sorted((HERE / "coming_from").glob("*.md"))]
    return "\n".join(
        [
            "# learner",
            "",
            "> A small training library for PyTorch: a readable loop with callbacks, in notebooks.",
            "",
            "## Reference",
            "",
            "- [The whole reference in one file](learner.md): hooks, names, errors, commands",
            "- [Hooks and fixtures](reference/hooks.html)",
            "- [Errors](reference/errors.html)",
            "- [Command line](reference/command_line.html)",
            "",
            "## Start",
            "",
            *(
                f"- [{title}](start/{name}.html): {purpose}"
                for name, (title, purpose) in start.items()
            ),
            "",
            "## Coming from other libraries",
            "",
            *(f"- [{name}](coming_from/{name}.html)" for name in others if name != "index"),
            "",
            "## Names of `from learner import ...`",
            "",
            *(f"- [{name}](reference/{name}.html): {text}" for name, text in purposes.items()),
            "",
            "## Modules",
            "",
            *(
                f"- [learner.{short}](reference/modules/{short}.html): {module.__doc__.strip()} "
                f"({', '.join(public(module))})"
                for short, module in modules().items()
            ),
            "",
        ]
    )


def gather(folder):
    "Write the sources of all pages; returns the files that go beside the pages."
    from notebooks import FOLDERS, write_design, write_gallery, write_notebooks
    from reference import write_reference

    keep = Sources(folder)
    for name in BY_HAND:
        keep.take(name)
    write_notebooks(keep)
    write_gallery(keep)
    folders = write_design(keep)
    index = (HERE / "design/index.md").read_text(encoding="utf-8")
    keep(
        "design/index.md",
        index.replace(
            "FOLDERS",
            "\n".join(
                f"[{name}]({name}.md)\n: {FOLDERS[name].capitalize()}.\n" for name in folders
            ),
        ).replace("TREE", "\n".join(folders)),
    )
    keep("changes.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    whole, purposes = write_reference(
        keep, (HERE / "reference/run_folder.md").read_text(encoding="utf-8")
    )
    keep.tidy()
    return {"learner.md": whole, "llms.txt": llms_txt(purposes)}


def main(out="_docs", sources="build/docs"):
    "Build all pages; returns the exit status, which is 1 if there was a warning."
    from sphinx.cmd.build import build_main

    beside = gather(sources)
    failed = build_main(
        [
            "-W",
            "--keep-going",
            "-q",
            "-E",
            "-a",
            "-b",
            "html",
            "-d",
            f"{sources}.doctrees",
            sources,
            out,
        ]
    )
    # myst-nb leaves a copy of what it has read beside the folder of the pages.
    shutil.rmtree(Path(out).resolve().parent / "jupyter_execute", ignore_errors=True)
    for name, text in beside.items():
        Path(out, name).write_text(text, encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
