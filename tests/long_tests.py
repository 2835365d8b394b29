"""The list of long tests, tests/long.toml, and which tests its entries name."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """Tests whose ids begin with `tests` and in whose parameters the regular expression `having` is found."""

    tests: str
    seconds: int  # of processor time
    reason: str
    having: str = ""

    def names(self, node_id: str) -> bool:
        """True if the test with this id is one of them."""
        name, _, parameters = node_id.partition("[")
        return name.startswith(self.tests) and re.search(self.having, parameters.removesuffix("]")) is not None


def long_tests() -> list[Entry]:
    """All entries of the list."""
    text = (Path(__file__).parent / "long.toml").read_text(encoding="utf-8")
    return [Entry(**entry) for entry in tomllib.loads(text)["long"]]
