"""A mutant: one fault, as data, and the tests that are there to notice it."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One text of one file in place of another.

    Attributes:
        file: The file, from the root of the project.
        text: What stands there now, exactly once.
        replacement: What stands there in the mutant.
        tests: The tests that must fail, files or node ids of pytest. A few that are
            quick, not all that would.
        breaks: What is wrong then, in one line.
        survives: Why no test can fail, where none can; None elsewhere.
    """

    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    breaks: str
    survives: str | None = None

    def applied(self, source: str) -> str:
        """The file's `source` with the fault.

        Raises:
            ValueError: when the text is not there exactly once: the code has changed,
                and the mutant has to follow.
        """
        count = source.count(self.text)
        if count != 1 or self.text == self.replacement:
            raise ValueError(
                f"A mutant's text must occur once in {self.file}, and differ from its "
                f"replacement. Received: {self.text!r}, {count} times"
            )
        return source.replace(self.text, self.replacement)


def check(mutants: Sequence[Mutant], root: Path) -> None:
    """Raises for mutants that are out of date, and runs none.

    Args:
        mutants: The mutants.
        root: The root of the project.

    Raises:
        ValueError: names every text that is not there once, and every test that is not
            there.
    """
    wrong = []
    for mutant in mutants:
        try:
            mutant.applied((root / mutant.file).read_text("utf-8"))
        except (ValueError, FileNotFoundError) as error:
            wrong.append(str(error))
        wrong += [
            f"There is no test {test!r}, which is to notice that {mutant.breaks}"
            for test in mutant.tests
            if not _is_there(root, test)
        ]
    if wrong:
        raise ValueError("Mutants are out of date:\n" + "\n".join(wrong))


def _is_there(root: Path, test: str) -> bool:
    file, *names = test.split("::")
    path = root / file
    if not path.is_file():
        return False
    source = path.read_text("utf-8")
    return all(
        re.search(
            rf"^\s*(def|class) {re.escape(name.partition('[')[0])}\b", source, re.M
        )
        for name in names
    )
