"""The README where there is no repository around it, as on a package index."""

import runpy
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme(monkeypatch, **urls):
    """What the package's metadata say, of a build that hatchling is not needed for."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["Readme"]()
    hook.root, metadata = str(ROOT), {"urls": urls}
    hook.update(metadata)
    return metadata["readme"]["text"]


def test_links_lead_into_the_repository(monkeypatch):
    text = readme(monkeypatch, Repository="https://host/who/flaxbn/")
    assert "](https://host/who/flaxbn/blob/main/docs/tutorial.md)" in text
    assert "](https://host/who/flaxbn/raw/main/docs/erratic_validation.png)" in text
    assert text.count("](") == text.count("](https://") > 15


def test_without_a_repository_there_are_no_links_that_lead_nowhere(monkeypatch):
    text = readme(monkeypatch)
    assert "](" not in text
    assert "![" not in text
    assert "seven questions on real data" in text
