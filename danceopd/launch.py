"""`python -m danceopd.launch ...`: torchrun, except that it ends with the code its workers ended with.

torchrun ends with 1 however its workers ended, and so hides from a Job's failure policy, or from a pipeline's step,
what `danceopd` says by its exit code: 2 (bad input, do not try again) and 75 (stopped, try again). It also kills
workers 30 s after a SIGTERM, which may be too soon to write a checkpoint. All else is torchrun's own: arguments,
`PET_*` variables, rendezvous.

    python -m danceopd.launch --standalone --nproc-per-node 8 -m danceopd distill --recipe world
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from danceopd.errors import ExitCode

SIGNALLED = 128  # and the number of the signal that killed a worker
GRACE = 270  # seconds to write a checkpoint after a SIGTERM, within a pod's 300
log = logging.getLogger(__name__)


def launch(arguments: Sequence[str]) -> int:
    """Start the workers on this node and wait for them.

    Args:
        arguments: as torchrun takes them.

    Returns:
        0 if all ended well; 2 or 75 if a worker did; 75 if this process was told to stop; else the first failed
        worker's code, 128 plus the signal's number for one that was killed by it.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return exit_code([first.exitcode, *(failure.exitcode for failure in error.failures.values())])
    except SignalException as stop:
        log.warning("stopped by %s; started again, it goes on from its last checkpoint", stop.sigval.name)
        return ExitCode.INTERRUPTED
    return 0


def exit_code(codes: Sequence[int]) -> int:
    """One code for several workers that failed, the first one's first.

    A worker whose peer is gone fails too, over the lost connection; so a code that means something goes before one
    that does not.
    """
    meant = [code for code in (ExitCode.BAD_INPUT, ExitCode.INTERRUPTED) if code in codes]
    first = meant[0] if meant else codes[0]
    return first if first >= 0 else SIGNALLED - first


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
