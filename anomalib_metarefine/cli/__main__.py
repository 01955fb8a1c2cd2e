"""``python -m anomalib_metarefine.cli``."""

import sys

from anomalib_metarefine.cli import main

sys.exit(main())
