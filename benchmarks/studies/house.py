"""How large the code is, how it is laid out, and how much of it one sample needs: counted in any checkout.

python benchmarks/studies/house.py             # this checkout
python benchmarks/studies/house.py ../other    # another one, with this environment's libraries

It prints Python files and lines per subpackage, entries and files per folder, the import arrows and levels among the
parts of ``busigen.runtime`` (grimp, which import-linter brings; imports inside functions count, those for type checking
do not), and the modules that ``busigen generate --count 2`` loads and enters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import grimp

TREE = Path(__file__).resolve().parents[2]
RUNTIME = "busigen.runtime"

_GENERATE = """
import atexit, sys, threading
from pathlib import Path
out, listing = sys.argv[1:]
entered = set()

def enter(frame, event, argument):
    if event == "call" and not frame.f_code.co_name.startswith("<"):
        entered.add(frame.f_code.co_filename)

def write():
    sys.setprofile(None)
    of_busigen = [name for name in entered if "/busigen/" in name and name.endswith(".py")]
    Path(listing).write_text("\\n".join([str(len(of_busigen)), *sys.modules]))

atexit.register(write)
from busigen.cli import main
sys.argv = ["busigen", "generate", "--count", "2", "--out", out]
threading.setprofile(enter)
sys.setprofile(enter)
main()
"""


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", type=Path, default=TREE, help="the checkout; this one by default")
    tree = parser.parse_args().tree.resolve()
    sizes(tree)
    folders(tree)
    arrows(tree)
    loaded(tree)


def sizes(tree: Path) -> None:
    """Print Python files and lines of each subpackage, the loose modules, the package, tests and benchmarks."""
    package = tree / "busigen"
    subpackages = [part for part in sorted(package.iterdir()) if (part / "__init__.py").is_file()]
    parts = {f"{part.name}/": [*part.rglob("*.py")] for part in subpackages}
    parts["(modules)"] = [*package.glob("*.py")]
    parts["busigen"] = [*package.rglob("*.py")]
    parts |= {name: [*(tree / name).rglob("*.py")] for name in ("tests", "benchmarks")}
    print(f"{'part':16}{'files':>7}{'lines':>8}")
    for name, files in parts.items():
        print(f"{name:16}{len(files):7}{sum(len(file.read_bytes().splitlines()) for file in files):8}")


def folders(tree: Path) -> None:
    """Print entries and Python files of each folder of the package that holds any."""
    print(f"\n{'folder':40}{'entries':>8}{'files':>7}")
    for folder in sorted({file.parent for file in (tree / "busigen").rglob("*.py")}):
        entries = [entry for entry in folder.iterdir() if entry.name not in ("__pycache__", "__init__.py")]
        files = [entry for entry in entries if entry.suffix == ".py"]
        print(f"{folder.relative_to(tree)!s:40}{len(entries):8}{len(files):7}")


def arrows(tree: Path) -> None:
    """Print the parts of ``runtime``, the import arrows between them, and the levels that these make."""
    sys.path.insert(0, str(tree))
    graph = grimp.build_graph("busigen", exclude_type_checking_imports=True, cache_dir=None)
    modules = graph.find_descendants(RUNTIME)
    pairs = {
        (_part(importer), _part(imported))
        for importer in modules
        for imported in graph.find_modules_directly_imported_by(importer) & modules
    }
    imports: dict[str, set[str]] = {_part(module): set() for module in modules}
    for importer, imported in pairs:
        imports[importer] |= {imported} - {importer}
    below = {part: reached(part, imports) for part in imports}
    circles = {part for part in imports if part in below[part]}
    print(f"\nruntime: {len(imports)} parts, {sum(map(len, imports.values()))} arrows, ", end="")
    print(f"{max(levels(below).values())} levels, {len(circles)} parts in circles; {len(modules)} modules")


def reached(part: str, imports: Mapping[str, set[str]]) -> set[str]:
    """What a part imports, directly or through others; itself among it where it stands in a circle."""
    found: set[str] = set()
    todo = [*imports[part]]
    while todo:
        if (other := todo.pop()) not in found:
            found.add(other)
            todo += imports[other]
    return found


def levels(below: Mapping[str, set[str]]) -> dict[str, int]:
    """Each part's level: 1 for what imports nothing, else one above the highest below it; a circle is one level."""
    found: dict[str, int] = {}
    # What reaches little comes first, so that all that lies below a part has its level before it.
    for part in sorted(below, key=lambda part: len(below[part])):
        found[part] = 1 + max((found[other] for other in below[part] if part not in below[other]), default=0)
    return found


def loaded(tree: Path) -> None:
    """Print how many modules a run of two samples loads, and of how many of busigen's it calls functions."""
    with tempfile.TemporaryDirectory() as folder:
        out, listing = Path(folder) / "out", Path(folder) / "modules"
        subprocess.run(
            [sys.executable, "-c", _GENERATE, str(out), str(listing)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            check=True,
            capture_output=True,
        )
        entered, *names = listing.read_text().split("\n")
    own, runtime = (sum(f"{name}.".startswith(f"{prefix}.") for name in names) for prefix in ("busigen", RUNTIME))
    print(
        f"generate --count 2: {len(names)} modules loaded, {own} of them busigen's, {runtime} of its runtime; ", end=""
    )
    print(f"functions of {entered} of busigen's are called")


def _part(module: str) -> str:
    """The child of ``runtime`` that a module is, or lies in."""
    return module.removeprefix(f"{RUNTIME}.").partition(".")[0]


if __name__ == "__main__":
    main()
