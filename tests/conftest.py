"""One thread for torch and numba, set before anything imports them: bit-exact tests need one order
of additions, and more threads than free cores make small tests slow."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
