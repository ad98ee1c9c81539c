"""The documents name what there is: tests, modules, commands, fields of the format."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import msgspec
import pytest
from msgspec import inspect as types

from podtree.cli.main import _ALIASES, _VERBS
from podtree.image.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
OBJECTS = ROOT / "src" / "podtree" / "objects"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_NAME = re.compile(r"`([\w/]+\.(?:py|c))::(\w+)`")
ELSEWHERE = re.compile(r"(?<![\w$./])/(?:home|root|Users|work|build|mnt|workspace)/\w|https?://(?:localhost|127\.)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def names_in(name: str) -> set[str]:
    """Names of the tests of a test module, or of the cases of a self-verifying program."""
    path = TESTS / name if (TESTS / name).exists() else TESTS / "programs" / name
    assert path.exists(), f"docs/coverage.md names {name}, which is neither in tests nor in tests/programs"
    if path.suffix == ".c":
        return set(re.findall(r'\{"(\w+)", \w+\}', path.read_text()))
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    if path.parent.name == "programs":
        return {f.name for f in functions if any(ast.unparse(d) == "case" for d in f.decorator_list)}
    return {f.name for f in functions if f.name.startswith("test_")}


NAMED = sorted(set(TEST_NAME.findall(text_of("docs/coverage.md"))))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_named_exists(file: str) -> None:
    missing = {name for named, name in NAMED if named == file} - names_in(file)
    assert not missing, f"docs/coverage.md names tests of {file} that don't exist: {sorted(missing)}"


def test_every_table_row_is_whole() -> None:
    """A row with a test column names tests that can be found, or has a dash."""
    for line in text_of("docs/coverage.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and not set(line) <= set("|-") and cells[3] != "test":
            rest = TEST_NAME.sub("", cells[3]).strip()
            assert rest in ("", "-") and cells[3], line


def has_struct(path: Path) -> bool:
    """Whether a module defines state: a msgspec struct."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return any(base in ("msgspec.Struct", "SocketBase") for c in classes for base in map(ast.unparse, c.bases))


@pytest.mark.parametrize("module", sorted(p.stem for p in OBJECTS.glob("*.py") if has_struct(p)))
def test_every_kind_of_object_is_covered(module: str) -> None:
    assert f"`{module}`" in text_of("docs/coverage.md"), f"docs/coverage.md doesn't speak of objects/{module}.py"


def test_commands_exist() -> None:
    """`podtree VERB` in any document, and the table of verbs in the README, name verbs that there are."""
    verbs = {*_VERBS, *_ALIASES}
    for document in DOCUMENTS:
        code = re.findall(r"^# podtree (\w+)", document.read_text(), re.MULTILINE)
        code += re.findall(r"`podtree ([a-z]+)", document.read_text())
        assert set(code) <= verbs, f"{document.name}: {sorted(set(code) - verbs)}"
    table = text_of("README.md").split("## Verbs", 1)[1].split("## ", 1)[0]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_cells)) == verbs


def test_make_targets_exist() -> None:
    makefile = text_of("Makefile")
    for target in set(re.findall(r"\bmake ([a-z]+)(?=`|\s{2,})", text_of("README.md"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_exit_codes_are_the_errors_own() -> None:
    from podtree import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.PodtreeError)
    }
    table = text_of("README.md").split("## Exit codes", 1)[1].split("## ", 1)[0]
    assert codes <= {int(row) for row in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_place_of_one_machine(document: Path) -> None:
    for number, line in enumerate(document.read_text().splitlines(), 1):
        assert not ELSEWHERE.search(line), f"{document.name}:{number}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name}: {target}"
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        text = ((document.parent / file) if file else document).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{document.name}: #{anchor}"


def structs_below(kind: types.Type, found: dict[type, types.StructType]) -> dict[type, types.StructType]:
    """All structs that a type can hold."""
    if isinstance(kind, types.StructType):
        if kind.cls not in found:
            found[kind.cls] = kind
            for field in kind.fields:
                structs_below(field.type, found)
        return found
    for name in ("item_type", "key_type", "value_type"):
        if hasattr(kind, name):
            structs_below(getattr(kind, name), found)
    for name in ("item_types", "types"):
        for one in getattr(kind, name, ()):
            structs_below(one, found)
    return found


STRUCTS = structs_below(types.type_info(Manifest), {})


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
def test_every_field_of_the_format_is_described(cls: type[msgspec.Struct]) -> None:
    """In the section of its struct, in docs/format.md."""
    text = text_of("docs/format.md")
    sections = dict(re.findall(r"^### `([^`]+)`\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL))
    module = cls.__module__.removeprefix("podtree.")
    named = [body for name, body in sections.items() if name.split(" ")[0] == cls.__name__ and f".{module}`" in body]
    assert len(named) == 1, f"docs/format.md has no section for {cls.__name__} of {module}"
    known = named[0] + (sections["SocketBase"] if "fields of `SocketBase`" in named[0] else "")
    missing = [field.encode_name for field in STRUCTS[cls].fields if f"| `{field.encode_name}` |" not in known]
    assert not missing, f"docs/format.md: {cls.__name__} lacks {missing}"
    tag = STRUCTS[cls].tag
    assert tag is None or f"Tag `{tag}`" in named[0]
    inherited = sections["SocketBase"] if known != named[0] else ""
    described = set(re.findall(r"^\| `(\w+)` \|", named[0] + inherited, re.MULTILINE))
    gone = described - {field.encode_name for field in STRUCTS[cls].fields}
    assert not gone, f"docs/format.md: {cls.__name__} has no {sorted(gone)}"
