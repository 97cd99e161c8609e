"""``python -m microbatch``."""

import sys

if __name__ == "__main__":
    try:
        from microbatch.cli import main  # takes long enough that Ctrl-C may interrupt it
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main())
