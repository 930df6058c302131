"""python -m iapo.evaluation is `iapo evaluate`: see `iapo.tools.evaluate`."""

import sys

from iapo.tools.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
