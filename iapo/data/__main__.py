"""python -m iapo.data is the command iapo data."""

import sys

from iapo.data import main

sys.exit(main())
