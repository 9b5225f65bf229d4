"""Speed and memory against PyTorch, JAX and NumPy: ``python benchmarks/run.py``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler keeps to itself; read when torch is imported
