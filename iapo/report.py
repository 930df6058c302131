"""python -m iapo.report is `iapo report`: see `iapo.tools.report`."""

import sys

from iapo.tools.report import main

if __name__ == "__main__":
    sys.exit(main())
