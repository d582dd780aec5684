import sys
from pathlib import Path

# Benchmarks are scripts and import their neighbours by name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
