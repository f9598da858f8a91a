"""The files that the scripts of this folder write. Importing it puts the repository's root on sys.path.

It imports neither torch nor transformers, which takes seconds."""
import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                                  # the top-level modules

from support.errors import fail  # noqa: E402


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path} cannot be used as a folder: {error}")
    return Path(path)


def write_json(path, record):
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path, rows):
    """Dicts with the same keys; floats with all their digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def markdown(header, rows):
    """A Markdown table; floats must be formatted already. A "|" inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
