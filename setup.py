"""What pyproject.toml cannot say: the folder passes/, with all below it, is the package rmtcompile.passes."""

from setuptools import find_packages, setup

PASSES = [f"rmtcompile.{name}" for name in find_packages(include=["passes", "passes.*"])]

setup(
    packages=find_packages(include=["rmtcompile", "rmtcompile.*"]) + PASSES,
    package_dir={"rmtcompile.passes": "passes"},
)
