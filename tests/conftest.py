from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Small networks on few cores: more threads only wait for each other. Subprocesses inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
# It guards against a failure of the power
os.fsync = lambda descriptor: None

# A busy machine is no fault of what is tested
settings.register_profile("clkit", deadline=None)
settings.load_profile("clkit")

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_root with the real Fashion-MNIST files in torchvision's layout."""
    archives = sorted(DEBIAN_FASHION.glob("*.gz"))
    if len(archives) != 4:
        missing = f"needs Fashion-MNIST in {DEBIAN_FASHION}: apt-get install dataset-fashion-mnist"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in archives:
        with gzip.open(archive) as packed, open(raw / archive.stem, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return str(root)
