"""What pyproject.toml cannot say: the folder passes/, with all below it, is the package rmtcompile.passes;
and what a package index is given as README.

Links into the repository lead nowhere on a package index. They become absolute where pyproject.toml says
where the repository is (`[project.urls]`, `Repository`); without that, their words stay, and pictures go.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HOME = Path(__file__).parent
PASSES = [f"rmtcompile.{name}" for name in find_packages(include=["passes", "passes.*"])]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def for_an_index(readme: str, repository: str | None) -> str:
    """README.md with no link into the repository that is relative."""

    def absolute(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        if repository is None:
            return "" if mark else words
        return f"{mark}[{words}]({repository.rstrip('/')}/{'raw' if mark else 'blob'}/HEAD/{path})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        packages=find_packages(include=["rmtcompile", "rmtcompile.*"]) + PASSES,
        package_dir={"rmtcompile.passes": "passes"},
        long_description=for_an_index(
            (HOME / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
