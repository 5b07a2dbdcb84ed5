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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        print(end="", flush=True)     # here, where a pipe that nobody reads is caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            _flush()
            raise
        _refuse(stop.code)
    except subprocess.CalledProcessError as error:
        _refuse(f"{tool}: this failed: {' '.join(map(str, error.cmd))}")
    except Exception as error:
        from train import USER_ERRORS
        if not isinstance(error, (*USER_ERRORS, UnicodeDecodeError, EOFError)):
            raise
        _refuse(f"{tool}: {error}")


def _refuse(message):
    """Code 2, as the project's commands have it; sys.exit(message) would be 1."""
    print(message, file=sys.stderr)
    _flush()
    sys.exit(2)


def _flush():
    """What a full disk does not take, Python would try again as it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
