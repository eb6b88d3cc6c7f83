"""`python embed.py OUT FOLDER... -- FILE...`: C++ that holds each kernel source, device.h first, without an #include.

A name in quotes is looked for in the folders and put in place of its line, once per source; one that is not found, or
stands in angle brackets, belongs to another compiler.
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'\s*#\s*include\s*(?:"(.+)"|<.+>)')
COMMENT = re.compile(r"\s*//.*")


def text(path: Path, folders: list[Path], seen: set[Path]) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        include = INCLUDE.match(line)
        if include is None:
            if line != "#pragma once" and not COMMENT.fullmatch(line):
                lines.append(line)
            continue
        name = include[1] or ""
        found = next((folder / name for folder in folders if name and (folder / name).exists()), None)
        if found and found not in seen:
            seen.add(found)
            lines.append(text(found, folders, seen))
    return "\n".join(lines)


def source(file: Path, folders: list[Path]) -> str:
    seen: set[Path] = set()
    head = Path(__file__).with_name("device.h")
    return "\n".join((text(head, folders, seen), text(file, folders, seen), ""))


def main(out: str, folders: list[Path], files: list[Path]) -> None:
    entries = [f'    {{"{file.name}", R"halfbyte({source(file, folders)})halfbyte"}},\n' for file in files]
    head = '#include "sources.h"\n\nnamespace halfbyte::xpu {\n\nconst Source sources[] = {\n'
    Path(out).write_text(head + "".join(entries) + "    {nullptr, nullptr},\n};\n\n}  // namespace halfbyte::xpu\n")


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(sys.argv[1], [Path(one) for one in sys.argv[2:split]], [Path(one) for one in sys.argv[split + 1 :]])
