"""All metadata. kernels/, experiments/ and benchmarks/ lie beside the package and install inside it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lth-sparse",
    version="0.1.0",
    description="Sparse training kernels for the Lottery Ticket Hypothesis: masked layers, "
    "iterative magnitude pruning, and the paper reproduced",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    keywords=["lottery ticket hypothesis", "pruning", "sparse training", "sparsity", "pytorch", "triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["lth_sparse", "lth_sparse.*"]),
        "lth_sparse.kernels",
        "lth_sparse.experiments",
        "lth_sparse.benchmarks",
        "lth_sparse.benchmarks.peers",
    ],
    package_dir={f"lth_sparse.{name}": name for name in ("kernels", "experiments", "benchmarks")},
    package_data={"lth_sparse.experiments": ["*.toml", "*.json", "tutorials/*.*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "rich",
        "matplotlib",
        "safetensors",
        "scikit-learn",
    ],
    extras_require={
        "test": ["pytest>=8.1", "pytest-benchmark", "hypothesis", "scipy", "setuptools>=77"],
        "dev": ["ruff", "pre-commit"],
    },
    entry_points={"console_scripts": ["lth = lth_sparse.cli:main"]},
)
