"""English that every CPython carries: the standard library's prose to train on, the language reference to be tested on.

Neither is stored in this package. Training text is the docstrings and comments of the standard library, one document a
module; test text is the pages of the language reference inside `pydoc_data`. Every page is held out, and a paragraph of
training text that shares eight words in a row with any page is dropped.
"""

import ast
import io
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError

SHINGLE_WORDS = 8

# Pages to test on. CPython repeats its "if", "try", ... pages inside "compound", "customization" and others
# inside "specialnames", "naming" inside "execmodel": of pages that repeat one another only one is here, because text
# seen before would flatter any adaptation. The longest and the shortest are left out, so that a run takes a minute and
# its documents, the unit of standard errors, weigh about the same.
_TEST_PAGES = (
    "assignment async attribute-access binary calls class context-managers dict execmodel function global identifiers "
    "import numeric-types objects operator-summary raise slicings strings subscriptions try typesmapping typesmethods "
    "with"
).split()

# Other packages, generated tables, and the test pages themselves.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}


def language_reference() -> dict[str, str]:
    """All pages of the language reference that this Python carries, by name.

    Raises:
        InputError: a Python without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(f"Python {platform.python_version()} has no pydoc_data.topics; pass --text FILE") from None
    return dict(topics)


def test_documents() -> list[str]:
    """The pages that the shipped model is tested on; they differ a little between Python versions."""
    pages = language_reference()
    return [pages[name] for name in _TEST_PAGES if name in pages]


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_WORDS words of a text, case and white space ignored."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}


def training_documents(modules: Iterable[Path] | None = None) -> Iterator[str]:
    """Docstrings and comments of the standard library, one document a module, none of it in the language reference.

    Args:
        modules: files to read; `standard_library()` where None.
    """
    held_out = set().union(*(shingles(page) for page in language_reference().values()))
    seen: set[str] = set()
    for path in standard_library() if modules is None else modules:
        kept = []
        for paragraph in _prose(path):
            # Licences and boilerplate are kept once, paragraphs that share words with the test pages never.
            if paragraph not in seen and held_out.isdisjoint(shingles(paragraph)):
                kept.append(paragraph)
                seen.add(paragraph)
        if kept:
            yield "\n\n".join(kept) + "\n"


def standard_library() -> list[Path]:
    """Source files of the standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path for path in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def _prose(path: Path) -> list[str]:
    """Docstrings and blocks of whole-line comments of one module, in their order; empty where it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        found: list[tuple[int, list[str]]] = [
            (node.body[0].lineno, [docstring])
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (docstring := ast.get_docstring(node)) is not None
        ]
        block: list[str] = []
        last = -1
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
                continue
            if token.start[0] != last + 1:
                block = []
                found.append((token.start[0], block))
            block.append(token.string.lstrip("#!:").removeprefix(" "))
            last = token.start[0]
    except (SyntaxError, ValueError, OSError, tokenize.TokenError, RecursionError):
        return []
    paragraphs = ("\n".join(lines) for _, lines in sorted(found, key=lambda f: f[0]))
    return [text.strip() for text in paragraphs if _is_english(text)]


def _is_english(text: str) -> bool:
    """Whether a paragraph reads like prose: some length, mostly letters and spaces, no private or odd characters."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= 40 and letters >= 0.75 * len(text) and "\u2581" not in text and "\0" not in text
