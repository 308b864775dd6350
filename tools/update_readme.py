"""Write the zoo table of the README anew from the table of published figures."""

from pathlib import Path

from effbackbones.models._zoo import ZOO, Published

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def zoo_table() -> str:
    """Return the zoo as a Markdown table."""
    head = ["Model", "Size", "Parameters", "GMACs", "ImageNet-1K top-1", "Source", "Note"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|--:|--:|---|---|"]
    return "\n".join(lines + [_line(row) for row in ZOO])


def with_zoo(readme: str) -> str:
    """Return the text of a README with the table between its two marks replaced."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{zoo_table()}\n{END}{after}"


def _line(row: Published) -> str:
    top1 = "-" if row.top1 is None else f"{row.top1:.1f}"
    cells = [f"`{row.model}`", row.size, f"{row.params / 1e6:.2f} M", f"{row.gmacs:.2f}", top1, row.source, row.note]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    README.write_text(with_zoo(README.read_text(encoding="utf-8")), encoding="utf-8")
