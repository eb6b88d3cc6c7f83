"""The ops, one file per family.  To add one: write its Op in a family file, add it to ALL, pass opcheck."""

from __future__ import annotations

from . import eightbit, fourbit, int8, linear4bit, optimizer

ALL = (*fourbit.OPS, *linear4bit.OPS, *eightbit.OPS, *int8.OPS, *optimizer.OPS)
