"""One of several processes that share a profile cache: python tests/cache_worker.py FOLDER FINGERPRINT NAME BATCHES.

With BATCHES of 0 it reads until the file FOLDER/done is there, and fails if a row goes or a key comes twice. Else it
appends that many batches of five rows of its own and one that all processes have.
"""

import json
import sys
import time
from pathlib import Path

from autoq.cache import Fingerprint, ProfileCache

BATCH = 5


def measured(fingerprint, m, scheme, time_us=10.0):
    return {
        "m": m, "k": 64, "n": 32, "dtype": "bfloat16", "bias": False, "scheme": scheme, "kernel": "avx2.int8.gemv",
        "status": "ok", "reason": "", "time_us": time_us, "baseline_us": 20.0, "ratio": time_us / 20, "origin": "",
        "device": fingerprint.device_key, **fingerprint.conditions("avx2.int8.gemv"),
    }  # fmt: skip


def write(cache, name, batches):
    for number in range(batches):
        rows = [measured(cache.fingerprint, 1 + BATCH * number + i, f"int8wo(a={name})") for i in range(BATCH)]
        cache.append([*rows, measured(cache.fingerprint, 1 + number, "shared")])


def read(cache, done):
    most = looks = 0
    while not done.exists():
        rows = cache.rows()
        keys = {(row["m"], row["scheme"]) for row in rows}
        assert len(keys) == len(rows), "a key came twice"
        assert len(rows) >= most, f"{len(rows)} rows after {most}"
        most = len(rows)
        looks += 1
    sys.stdout.write(f"{looks}")


if __name__ == "__main__":
    folder, parts, name, batches = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    cache = ProfileCache(folder, Fingerprint(**parts))
    (folder / f"ready-{name}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    write(cache, name, batches) if batches else read(cache, folder / "done")
