"""What a mutant is, and whether it still fits the code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One error.

    Args:
        name: of the law that it breaks, in a few words.
        file: below the repository's root.
        original: text that stands in the file exactly once.
        replacement: what it becomes.
        tests: files or single tests that should notice.
    """

    name: str
    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """Return the file's text with the error in it.

        Raises:
            ValueError: the original stands there not once, or the result does not compile.
        """
        count = text.count(self.original)
        if count != 1:
            raise ValueError(f"{self.name}: its original text stands {count} times in {self.file}, not once")
        mutated = text.replace(self.original, self.replacement)
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.name}: with it, {self.file} does not compile: {error}") from error
        return mutated

    def problem(self, root: Path) -> str | None:
        """Say why it cannot be applied to a tree, or None."""
        try:
            self.applied((root / self.file).read_text())
        except (OSError, ValueError) as error:
            return str(error)
        missing = [test for test in self.tests if not _is_there(root, test)]
        return f"{self.name}: there is no {', '.join(missing)}" if missing else None


def remembers(case: str) -> str:
    """Return the test that stops a run of this case again and again, and compares all of its state."""
    name = "test_a_run_stopped_again_and_again_remembers_all_that_an_uninterrupted_one_does"
    return f"tests/test_whole_state.py::{name}[{case}]"


def _is_there(root: Path, test: str) -> bool:
    file, _, name = test.partition("::")
    function, _, case = name.partition("[")
    if not (root / file).is_file():
        return False
    text = (root / file).read_text()
    return (not name or f"def {function}(" in text) and case.removesuffix("]") in text
