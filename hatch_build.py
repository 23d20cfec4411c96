"""The README as package indexes show it, which know nothing of the repository that its links are relative to."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://)([^)]+)\)")


def readable_elsewhere(text: str, repository: str | None) -> str:
    """Links lead into `repository`; without one, words stay where links were, and figures go."""

    def absolute(found: re.Match[str]) -> str:
        mark, words, path = found.groups()
        if repository is None:
            return "" if mark else words
        return f"{mark}[{words}]({repository.rstrip('/')}/{'raw' if mark else 'blob'}/main/{path})"

    return LINK.sub(absolute, text)


class Readme(MetadataHookInterface):
    """Called by hatchling for `dynamic = ["readme"]`; `Repository` in `project.urls` is where links lead."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Puts the text into the metadata of the package."""
        repository = metadata.get("urls", {}).get("Repository")
        text = readable_elsewhere((Path(self.root) / "README.md").read_text(encoding="utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
