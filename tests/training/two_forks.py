"""`launched.py` in two processes, as torchrun would start them, forked from one that has the libraries loaded already.

Like torchrun, the parent keeps the store by which they find each other, and ends the other when one fails.
"""

import os
import runpy
import signal
import socket
import sys
import traceback

import torch
from torch.distributed import TCPStore

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
torch.set_num_threads(1)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
del sys.argv[0]
running = set()
for rank in range(2):
    if (child := os.fork()) == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code: object = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    running.add(child)
store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # after the forks: it starts threads
failed = 0
while running:
    child, status = os.wait()
    running.remove(child)
    if status and not failed:
        failed = 1
        for other in running:
            os.kill(other, signal.SIGTERM)
sys.exit(failed)
