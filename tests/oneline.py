"""What the tools beside it share: a user's mistake is told in one line, and a reader of the output
who has seen enough is none."""
import os
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def told(tool):
    """Around the work of a tool: it ends with one line for what a user can mend, with no word where
    nobody reads on, and with a traceback for all else."""
    try:
        yield
        print(end="", flush=True)     # here, where a pipe that nobody reads is caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{tool}: this failed: {' '.join(map(str, error.cmd))}")
    except Exception as error:
        from train import USER_ERRORS
        if not isinstance(error, (*USER_ERRORS, UnicodeDecodeError, EOFError)):
            raise
        sys.exit(f"{tool}: {error}")
