"""Lets tests import the scripts, which belong to no package."""

import pathlib
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
