"""Writes down how it was started."""

import json
import os
import sys

facts = {"argv": sys.argv, "cwd": os.getcwd(), "path": sys.path, "name": __name__, "file": __file__}
with open("where.json", "w") as file:
    json.dump(facts, file)
