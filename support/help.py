"""What --help of a script prints: its docstring, within the terminal's width."""
import argparse
import textwrap


class DocFormatter(argparse.HelpFormatter):
    """A docstring as the description, within the terminal's width: its prose wrapped, its commands below comments."""

    def _fill_text(self, text, width, indent):
        filled = []
        for paragraph in text.strip().split("\n\n"):
            if paragraph.startswith(("python ", "pip ")):
                lines = []
                for command, _, comment in (line.partition("  # ") for line in paragraph.splitlines()):
                    parts = textwrap.wrap(command, width - 6, break_long_words=False, break_on_hyphens=False)
                    lines += [f"# {comment}"] * bool(comment) + [" \\\n    ".join(parts)]
                filled.append("\n".join(lines))
            else:
                filled.append(textwrap.fill(paragraph, width))
        return "\n\n".join(filled)
