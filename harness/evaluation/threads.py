"""How many threads share one matrix product during evaluation."""

import os
from pathlib import Path

# Below this a decoding step is a few hundred microseconds of arithmetic: measured with a 15 MB model, two threads took
# as long as one on an idle machine and up to twenty times as long where anything else was running, since OpenMP's
# threads wait for each other by spinning.
SMALL_MODEL_BYTES = 64 * 2**20


def threads_for(model: str | Path) -> int | None:
    """Threads to set for a model on the CPU, or None to leave what is set (OMP_NUM_THREADS, or all cores)."""
    folder = Path(model)
    if "OMP_NUM_THREADS" in os.environ or not folder.is_dir():
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 1 if size < SMALL_MODEL_BYTES else None
