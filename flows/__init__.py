"""The wiring: recipes, the command line, and the Prefect flow over the stages. No tensors and no SQL in here."""

import os

# Read by OpenMP when torch is first imported. Threads that spin while they wait cost nothing on an idle machine, and on
# a busy one slow a search down several times: the thread they wait for is the one that they keep off its core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when torch first takes GPU memory. A sweep keeps tensors of a few sizes among many short-lived ones; with
# segments that cannot grow, 30 of 139 GiB were reserved and of no use (H200, 2026-11-24).
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Read when torch first takes memory of the host. A sweep writes to gigabytes of fresh pages: with those of 2 MiB a
# search on two cores was an eighth faster (27 s in place of 31, 2026-11-28).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
