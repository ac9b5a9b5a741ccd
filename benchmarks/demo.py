"""What `make demo` runs: SmolLM2-135M, a prompt of 512 tokens and decoding after it, perplexity at most 5 % higher.

    python benchmarks/demo.py [--text FILE]

Writes demo/plan.json, demo/front.parquet, demo/report.html and demo/front.png, and prints one table. Any further
argument goes to `autoq tune`.
"""

import sys
from pathlib import Path

from autoq.cli import main

OUTPUT = Path(__file__).resolve().parents[1] / "demo"

if __name__ == "__main__":
    main(["tune", "smollm2", "--max-degradation", "0.05", "--output", str(OUTPUT), *sys.argv[1:]])
