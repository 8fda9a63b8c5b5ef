"""What the documents point at exists, and what they call is there."""

import re
import shlex
from pathlib import Path

import pytest

import sparsekit

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_of_the_package_are_real(document):
    for name in re.findall(r"\bsk\.([A-Za-z_]\w*)", document.read_text()):
        assert hasattr(sparsekit, name), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_commands_exist(document):
    from sparsekit.cli.app import app

    text = document.read_text()
    for script in re.findall(r"(?:python|bash) ((?:bench|demo)/\S+?\.(?:py|sh))", text):
        assert (REPOSITORY / script).is_file(), script
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    for line in re.findall(r"^sparsekit .+$", text, re.MULTILINE):
        assert shlex.split(line.split("#")[0])[1] in commands, line


def test_no_placeholder_is_left():
    for document in DOCUMENTS:
        assert not re.search(r"<!--|TODO|TBD|XXX", document.read_text()), document
