"""Packaging. `kernels/` and `platforms/` stand at the root and are imported as `ntops_mla.kernels` and
`ntops_mla.platforms`: mapped here for installs, and linked in `ntops_mla/` for checkouts and editable installs.
"""

import contextlib
import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version():
    return re.search(r'__version__ = "([^"]+)"', (ROOT / "ntops_mla" / "version.py").read_text(encoding="utf-8"))[1]


def requirements(name):
    lines = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def readme():
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def link_folders():
    """The links of a checkout, where they are missing: an unpacked sdist holds none, so that it holds each file once.
    Only through them can an editable install, or a program that runs in this folder, find the two."""
    for name in ("kernels", "platforms"):
        link = ROOT / "ntops_mla" / name
        if (ROOT / name).is_dir() and not os.path.lexists(link):
            # read-only sources, or a system without links: other kinds of install do not need them
            with contextlib.suppress(OSError):
                link.symlink_to(f"../{name}", target_is_directory=True)


link_folders()

setup(
    name="ntops_mla",
    version=version(),
    description="MLA and DSA attention from one NineToothed source for every accelerator that Triton reaches",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The two folders hold no __init__.py (kernels/README.md says why), so find_packages cannot see them.
    packages=[
        *find_packages(include=["ntops_mla", "ntops_mla.*"]),
        "ntops_mla.kernels",
        "ntops_mla.platforms",
    ],
    package_dir={"ntops_mla.kernels": "kernels", "ntops_mla.platforms": "platforms"},
    # A folder without a file would not be installed at all; then `import ntops_mla.kernels` would fail.
    package_data={"ntops_mla": ["tile_tables/*"], "ntops_mla.kernels": ["README.md"]},
    # Empty on purpose. The library needs torch and ninetoothed, but ninetoothed requires triton>=3.0.0: a plain
    # `pip install ntops_mla` on a vendor's machine would put the public Triton over, or in front of, the vendor's own
    # one, which may be older or called `flagtree`; and the vendor's torch may be a distribution of another name.
    # Where nothing is preinstalled: `pip install ntops_mla[full]`. Elsewhere: scripts/bootstrap.py shows what to do.
    install_requires=[],
    extras_require={
        "full": ["torch>=2.4", "ninetoothed"],
        "checkpoint": ["safetensors"],
        "test": requirements("requirements-test.txt"),
    },
    # ntops loads no plugins yet; `import ntops_mla` registers by itself.
    entry_points={"ntops.plugins": ["ntops_mla = ntops_mla.integrations.ntops:plugin"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
