"""The house rules: imports go down only, importing is cheap, what is installed works."""
import ast
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("base", "loop", "watch", "steer", "keep", "check", "runs", "use", "")  # folders from the ground up; on top the package itself
MODULES = sorted(".".join(path.relative_to(ROOT / "learner").with_suffix("").parts) for path in (ROOT / "learner").rglob("*.py")
                 if path.stem not in ("_modidx", "__init__"))

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def floor(module): return FLOORS.index(module.rpartition(".")[0])


def imported(module):
    "The modules of the package that one imports, at its head or within a function."
    source = (ROOT / "learner" / f"{module.replace('.', '/')}.py").read_text()
    package = ["learner", *module.split(".")[:-1]]
    for dots, name in re.findall(r"^\s*from (\.+|learner(?=[. ]))\.?([\w.]*) import", source, re.M):
        base = package[:len(package) - len(dots) + 1] if dots != "learner" else ["learner"]
        yield ".".join([*base, *filter(None, [name])]).removeprefix("learner").lstrip(".")


def python(code, **environment):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_floor_and_from_lower_ones_only(module):
    for other in imported(module):
        assert other in MODULES, f"{module} imports {other}, which is no module"
        assert floor(other) <= floor(module), f"{module} imports {other}, from a floor above its own"


def test_modules_of_one_floor_do_not_import_each_other_in_a_circle():
    below = {module: set(imported(module)) for module in MODULES}
    while below:
        ground = {module for module, needs in below.items() if not needs & below.keys()}
        assert ground, f"a circle among {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in ground}


def test_every_module_has_a_notebook_of_its_name():
    notebooks = {".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts) for path in (ROOT / "nbs").rglob("*.ipynb")
                 if path.parent.name in FLOORS or path.parent == ROOT / "nbs"}
    assert set(MODULES) == {"__main__" if name == "main" else name for name in notebooks} - {"init", "check.init", "watch.init"}


def long_functions(module):
    source = (ROOT / "learner" / f"{module.replace('.', '/')}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 40: yield node.name


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_of_moderate_length(module):
    lines = (ROOT / "learner" / f"{module.replace('.', '/')}.py").read_text().count("\n")
    assert lines <= 500, f"{module} has {lines} lines"
    assert list(long_functions(module)) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_exported_cells_are_of_moderate_length(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        lines = "".join(cell["source"]).rstrip().split("\n")
        if re.match(r"#\|\s*export", lines[0]): assert len(lines) - 1 <= 40, f"{lines[1]} ...: {len(lines) - 1} lines"


def test_only_the_lowest_floors_know_torch():
    out = python("import sys; import learner, learner.base.words, learner.loop.stages; print('torch' in sys.modules)")
    assert out.strip() == "False"  # the command line and the stages do without


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_loads_nothing_heavy(module):
    heavy = ["matplotlib", "sklearn", "torcheval", "torchmetrics", "fastprogress", "fasthtml", "IPython", "pandas"]
    out = python(f"import sys; import torch; had = set(sys.modules); import learner.{module}; "
                 f"print([m for m in {heavy} if m in sys.modules and m not in had])")
    assert out.strip() == "[]"


def test_the_main_names_are_handed_on():
    out = python("import learner, learner.all as everything; "
                 "print(all(getattr(learner, n) is getattr(everything, n) for n in everything.__all__), "
                 "set(everything.__all__) <= set(dir(learner)), learner.__version__)")
    assert out.split()[:2] == ["True", "True"]
    from configparser import ConfigParser
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    assert out.split()[2] == config["DEFAULT"]["version"]


def test_the_notebooks_tell_no_lies_about_the_main_names():
    assert "did you mean Learner?" in python("import learner\ntry: learner.Learnr\nexcept AttributeError as e: print(e)")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_are_alive(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"): assert (ROOT / link).exists(), f"{name}: {link}"


def test_the_examples_in_the_readme_run(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(code))
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "validation_accuracy" in done.stdout


def test_the_examples_in_the_readme_run_in_one_notebook_and_do_no_harm(tmp_path):
    "A range test, above all, leaves the weights as they were, and draws."
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    trial, = (number for number, block in enumerate(blocks) if "RangeTest" in block)
    definition, use = blocks[trial].split("with learn.trial()")
    sources = [*blocks[:trial], f"{definition}before = learn.fingerprint()", f"with learn.trial(){use}",
               "assert learn.fingerprint() == before", *blocks[trial + 1:], "assert learn.validate()['validation_loss'] < 0.5"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[trial + 1].outputs)


def test_the_demo_leaves_what_it_says(tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, "-m", "learner", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    command = re.search(r"^\t\$\(BIN\)/learner (train digits) \$\(RUNS\)/demo (--new_name)$", (ROOT / "Makefile").read_text(), re.M)
    folder = tmp_path / "demo"
    out = run(*command[1].split(), str(folder), command[2])
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", out)  # a pipe gets plain rows
    assert len((folder / "history.csv").read_text().splitlines()) == 13
    pictures = re.search(r"^pictures: (.+)$", out, re.M)[1].split(", ")
    assert [Path(picture).stem for picture in pictures] == ["accuracy", "loss", "predictions"]
    for picture in pictures: assert Path(picture).parent == folder / "plots" and Path(picture).read_bytes()[:4] == b"\x89PNG"
    accuracy = float(re.search(r"test_accuracy +([\d.]+)", run("evaluate", str(folder), "--split=test"))[1])
    assert accuracy >= 0.98
    assert str(tmp_path / "demo-2") in run(*command[1].split(), str(folder), command[2], "--epochs=1")


def test_a_wheel_works_in_an_empty_environment(tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    def run(*command): return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=clean)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    wheel = next(tmp_path.glob("nblearner-*.whl"))
    venv.create(tmp_path / "empty", with_pip=True)
    own = tmp_path / "empty/bin/python"
    run(own, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    out = run(own, "-c", "from learner import Learner; import learner, pathlib; "
              "print(Learner.__name__, (pathlib.Path(learner.__file__).parent / 'py.typed').exists(), learner.__file__)").stdout
    assert out.split()[:2] == ["Learner", "True"] and str(tmp_path) in out.split()[2]
