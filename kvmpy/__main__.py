"""`python -m kvmpy` is the command `kvmpy`."""

import sys

from kvmpy.cli import main

sys.exit(main())
