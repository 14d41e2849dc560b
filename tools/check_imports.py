"""Check the import rules of pyproject.toml: import-linter needs mapped folders where their packages are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def main(root: Path) -> int:
    """Run import-linter on a copy of the tree with strategies/ and scenarios/ inside clkit/; return its exit code."""
    with TemporaryDirectory() as tree:
        shutil.copytree(root / "clkit", Path(tree, "clkit"))
        for folder in ("strategies", "scenarios"):
            shutil.copytree(root / folder, Path(tree, "clkit", folder))
        lint = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", root / "pyproject.toml"]
        return subprocess.run(lint, cwd=tree).returncode


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
