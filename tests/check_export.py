"""Exit with 1 unless the modules are what the notebooks export and the notebooks are clean and executed."""
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent


def run(*command: str, cwd: Path) -> None: subprocess.run([TOOLS / command[0], *command[1:]], cwd=cwd, check=True)


def main() -> int:
    problems = []
    with tempfile.TemporaryDirectory() as folder:  # a copy, so that a check never changes what it checks
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in ("nbs", "learner"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for module in (copy / "learner").rglob("*.py"): module.unlink()
        run("nbdev-export", cwd=copy)
        run("nbdev-clean", cwd=copy)
        made = {str(path.relative_to(copy / "learner")) for path in (copy / "learner").rglob("*.py")}
        kept = {str(path.relative_to(ROOT / "learner")) for path in (ROOT / "learner").rglob("*.py")}
        problems += [f"learner/{name}: no notebook exports it" for name in sorted(kept - made)]
        for name in sorted(made):
            if name not in kept or not filecmp.cmp(copy / "learner" / name, ROOT / "learner" / name, shallow=False):
                problems.append(f"learner/{name}: differs from a fresh export; run make export")
        for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
            relative = path.relative_to(ROOT)
            if ".ipynb_checkpoints" in path.parts: continue
            if not filecmp.cmp(path, copy / relative, shallow=False):
                problems.append(f"{relative}: is not clean; run nbdev-clean")
            cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
            if not any(cell["outputs"] for cell in cells): problems.append(f"{relative}: has no outputs; run make notebooks")
            for cell in cells:
                for output in cell["outputs"]:
                    if output["output_type"] == "error": problems.append(f"{relative}: ends in {output['ename']}")
            if path.stat().st_size > 300 * 1024: problems.append(f"{relative}: {path.stat().st_size // 1024} KB; keep it under 300")
    print("\n".join(problems) or "export and notebooks are up to date")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
