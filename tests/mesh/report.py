"""Report: counts checks and says which failed."""

from __future__ import annotations

import sys


class Report:
    """Checks of one program; the last line is `N passed, N failed`."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0

    def check(self, name: str, holds: bool, detail: object = "") -> bool:
        """Counts one check."""
        if holds:
            self.passed += 1
            print(f"ok     {name}")
        else:
            self.failed += 1
            print(f"FAILED {name}{f': {detail}' if detail else ''}")
        sys.stdout.flush()
        return holds

    def none(self, name: str, found: list[str]) -> bool:
        """Counts one check that nothing is wrong."""
        return self.check(name, not found, "".join(f"\n         {each}" for each in found[:20]))

    def finish(self) -> int:
        """Prints the counts; the exit status."""
        print(f"{self.passed} passed, {self.failed} failed")
        return 1 if self.failed or not self.passed else 0
