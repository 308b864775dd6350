"""Write the README's tables anew: the zoo from the published figures, the speed from the suite's file."""

import json
from pathlib import Path

from effbackbones.bench.report import hardware
from effbackbones.bench.suite import table
from effbackbones.models._zoo import ZOO, Published

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SUITE = ROOT / "tools" / "benchmarks" / "cpu.json"


def zoo_table() -> str:
    """Return the zoo as a Markdown table."""
    head = ["Model", "Size", "Parameters", "GMACs", "ImageNet-1K top-1", "Source", "Note"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|--:|--:|---|---|"]
    return "\n".join(lines + [_line(row) for row in ZOO])


def speed_table() -> str:
    """Return the suite's results as a Markdown table, below what they were measured on."""
    document = json.loads(SUITE.read_text(encoding="utf-8"))
    environment = document["environment"]
    versions = f"torch {environment['versions']['torch']}, Python {environment['python']}"
    return f"{hardware(environment)}; {versions}.\n\n{table(document)}"


def with_tables(readme: str) -> str:
    """Return the text of a README with the tables between their marks replaced."""
    for name, text in (("zoo", zoo_table()), ("speed", speed_table())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return readme


def _line(row: Published) -> str:
    top1 = "-" if row.top1 is None else f"{row.top1:.1f}"
    cells = [f"`{row.model}`", row.size, f"{row.params / 1e6:.2f} M", f"{row.gmacs:.2f}", top1, row.source, row.note]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
