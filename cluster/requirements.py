"""The packages that diffmine and some of its extras need, without diffmine: an image's layer that seldom changes.

python cluster/requirements.py s3
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + [line for name in sys.argv[1:] for line in extras[name]]))
